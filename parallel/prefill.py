"""Passes without gradients on several parts of the batch in turns: prefill, evaluation, one pass of `generate`.

The rows of the batch are shared out over lanes; outputs are put together by rows. What cannot be put together again
runs in one piece: losses, a cache that already holds tokens (decoding) or whose layers keep less than all of them.
Under pp the parts of a batch follow each other through the stages instead (`staged_forward.py`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.comm.overlap import in_lane
from moeweave.parallel.hf.attention import CACHES, cache_of
from moeweave.parallel.microbatch import agree_on_lanes, in_lanes, kept_gathered
from moeweave.parallel.record import Record
from moeweave.parallel.span import current_span

WHOLE = ("cache_position",)  # arguments that are no rows of the batch


def install_prefill(model: nn.Module, record: Record) -> None:
    """Make `model.forward` run its rows in turns where no gradient is wanted and the plan overlaps micro-batches."""
    if record.plan.overlap != "microbatch" or not record.calls:
        return
    own, names = model.forward, inspect.signature(model.forward)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        apart = in_lane() or record.pipeline is not None or current_span() is not None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or apart:
            return own(*args, **kwargs)
        given = dict(names.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        lanes = agree_on_lanes(_rows(given, model), 1, record)
        if lanes == 1:
            return own(*args, **kwargs)
        parts = _split(given, lanes)
        with kept_gathered(model):
            outputs = in_lanes(model, [functools.partial(own, **part) for part in parts], record)
        return _join(outputs, cache_of(given))

    vars(model)["forward"] = forward


def _rows(given: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The tensors that are cut by rows; nothing where the pass must run in one piece."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and has_rows(name, value)}
    asked = given.get("output_router_logits")
    balanced = getattr(getattr(model, "config", None), "output_router_logits", False) if asked is None else asked
    whole = given.get("labels") is not None or balanced or not _is_empty(cache_of(given))
    return {} if whole or len({value.shape[0] for value in tensors.values()}) != 1 else tensors


def has_rows(name: str, value: Tensor) -> bool:
    """Whether an argument of a forward is cut by rows of the batch."""
    return value.dim() > 1 and name not in WHOLE and not (name == "position_ids" and value.shape[0] == 1)


def _is_empty(cache: Any) -> bool:
    if cache is None:
        return True
    layers = getattr(cache, "layers", None)
    plain = layers is not None and all(type(layer).__name__ == "DynamicLayer" for layer in layers)
    return plain and cache.get_seq_length() == 0


def _split(given: dict[str, Any], lanes: int) -> list[dict[str, Any]]:
    pieces: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and has_rows(name, value):
            pieces[name] = value.tensor_split(lanes)
        elif name in CACHES and value is not None:
            pieces[name] = [copy.deepcopy(value) for _ in range(lanes)]
        else:
            pieces[name] = [value] * lanes
    return [{name: piece[lane] for name, piece in pieces.items()} for lane in range(lanes)]


def _join(outputs: list[Any], cache: Any) -> Any:
    """Outputs of the parts -> what the whole batch would have given; `cache` is filled with what they cached."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if first is None or isinstance(first, (int, float, str)):
        return first
    if hasattr(first, "layers") and hasattr(first, "get_seq_length"):
        return _join_caches(outputs, cache)
    if isinstance(first, dict):
        joined = {name: _join([output[name] for output in outputs], cache) for name in first}
        return type(first)(**joined)
    if isinstance(first, (tuple, list)):
        return type(first)(_join(list(each), cache) for each in zip(*outputs, strict=True))
    raise TypeError(
        f"{type(first).__name__}, returned by the model, cannot be put together from parts of a batch. Set "
        "Plan(overlap=None), or return tensors, tuples, dicts or transformers' outputs."
    )


def _join_caches(parts: list[Any], cache: Any) -> Any:
    """Keys and values by rows, in the cache that was given, or in the first part's."""
    joined = [
        (torch.cat([layer.keys for layer in same]), torch.cat([layer.values for layer in same]))
        for same in zip(*(part.layers for part in parts), strict=True)
    ]
    if cache is None:
        for layer, (keys, values) in zip(parts[0].layers, joined, strict=True):
            layer.keys, layer.values = keys, values
        return parts[0]
    for index, (keys, values) in enumerate(joined):
        cache.update(keys, values, index)
    return cache
