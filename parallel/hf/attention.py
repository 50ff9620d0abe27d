"""The attention of Hugging Face models, by the registry that all of them look their attention function up in.

An attention module is one whose forward reads `ALL_ATTENTION_FUNCTIONS`. It is given a function of its own there, under
a name that ends in the one it had ("moeweave_sdpa"), so that code which asks for a kind of attention sees the same one.
The model's masks are made by the registry of masks, under the same name, where they are wanted block by block.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moeweave.parallel.adapter import UnsupportedModel
from moeweave.parallel.ring import Interval, classified
from moeweave.parallel.shards import Shards

# (module, the function it had, query [B, H, s, d], key, value, mask, further keywords) -> (out [B, s, H, e], weights)
Attend = Callable[..., tuple[Tensor, Tensor | None]]
_PREFIX = "moeweave_"


def is_attention(module: nn.Module) -> bool:
    """Whether a module computes attention by a function of transformers' registry."""
    return "ALL_ATTENTION_FUNCTIONS" in getattr(_code(module), "co_names", ())


def _code(module: nn.Module) -> Any:
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def route_attention(path: str, module: Any, attend: Attend) -> Any:
    """Let `module` compute attention by `attend`; returns the config that it shares with its model.

    Raises:
        UnsupportedModel: the attention function that the module uses cannot be told.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = module.config
    kind = config._attn_implementation or "eager"
    # Some releases look "eager" up in the module's own file.
    names = inspect.unwrap(type(module).forward).__globals__
    inner = names.get("eager_attention_forward") if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
    if inner is None:
        raise UnsupportedModel(
            f"{path} ({type(module).__name__}) has no attention function for {kind!r} that a sequence can be shared "
            "through. Build the model with attn_implementation='sdpa', or set sp=1."
        )
    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + kind, _call)
    vars(module)["_moeweave_attend"] = (attend, inner)
    # A copy: the config is the whole model's, and may be another model's too.
    module.config = copy.copy(config)
    module.config._attn_implementation_internal = _PREFIX + kind
    return config


def _call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    attend, inner = vars(module)["_moeweave_attend"]
    return attend(module, inner, query, key, value, attention_mask, *args, **kwargs)


class FunctionMask:
    """Blocks of a mask that transformers says by a function of positions; see `ring.BlockMask`."""

    def __init__(self, make: Callable[..., Tensor], options: dict[str, Any]) -> None:
        self.make, self.options = make, options
        self.known: dict[tuple[Interval, Interval], str | None] = {}

    def block(self, queries: Interval, keys: Interval) -> Tensor | str | None:
        at = (queries, keys)
        if at in self.known:
            return self.known[at]
        block = classified(
            self.make(
                **self.options,
                q_length=queries[1] - queries[0],
                q_offset=queries[0],
                kv_length=keys[1] - keys[0],
                kv_offset=keys[0],
            )
        )
        if not isinstance(block, Tensor):
            self.known[at] = block
        return block


def _describe(**options: Any) -> FunctionMask:
    from transformers.masking_utils import sdpa_mask

    if "q_length" not in options:
        raise UnsupportedModel(
            "Plan(sequence='ring') needs masks by q_length and q_offset, which this transformers does not have. "
            "Install a newer one, or use Plan(sequence='ulysses')."
        )
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    own = {name: value for name, value in options.items() if name not in _PLACE}
    return FunctionMask(sdpa_mask, {**own, **skips})


_PLACE = ("q_length", "q_offset", "kv_length", "kv_offset")


@contextmanager
def masks_by_block(configs: list[Any]) -> Iterator[None]:
    """Models with these configs make `FunctionMask`s inside, which are never whole in memory."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    before = [config._attn_implementation_internal for config in configs]
    for config, kind in zip(configs, before, strict=True):
        name = _PREFIX + (kind or "eager")
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _describe)
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, kind in zip(configs, before, strict=True):
            config._attn_implementation_internal = kind


CACHES = ("cache", "past_key_values")  # names of the key-value cache; transformers renamed it


def cache_of(holder: Any) -> Any:
    """The key-value cache among a model's arguments or outputs."""
    get = holder.get if isinstance(holder, dict) else lambda name: getattr(holder, name, None)
    found = get("cache")
    return found if found is not None else get("past_key_values")


def fills_by_shards(cache: Any) -> bool:
    """Whether a cache is empty and grows as it is filled, so that shards of a prompt can be put together in it."""
    layers = getattr(cache, "layers", None)
    grows = layers is not None and all(type(layer).__name__ in _GROWING for layer in layers)
    return grows and cache.get_seq_length() == 0


_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")


@contextmanager
def keeping_shards(cache: Any, shards: Shards) -> Iterator[None]:
    """Layers of an empty `cache` keep shards of keys and values [B, K, s, d] inside. Afterwards each was given them
    whole, and keeps what it would have: with a window, the last positions. Those of other pipeline stages are given
    whole prompts inside."""
    from transformers.cache_utils import DynamicLayer

    own = cache.layers
    cache.layers = [DynamicLayer() for _ in own]
    try:
        yield
        held = cache.layers
    finally:
        cache.layers = own
    for index, layer in enumerate(held):
        if layer.is_initialized:
            whole = (x if x.shape[2] == shards.length else shards.gather(x, 2) for x in (layer.keys, layer.values))
            cache.update(*whole, index)
