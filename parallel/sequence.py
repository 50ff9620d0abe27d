"""Sequences that ranks share over `sp`, and over `tp` between matrix products (tp_sequence).

Every rank is given the whole batch. The model computes embeddings, positions and masks of whole sequences as it always
does; in front of the first layer each rank keeps its own positions, and goes on with these alone:

    1. enter      hidden states, positions and rotary embeddings are cut to the rank's positions
    2. layers     token by token; attention sees the whole sequence (`attend.py`); a rank's router sends its own tokens
    3. leave      with labels, loss and head run on the rank's positions, each label on the rank of the position that
                  predicts it; else (no labels, a model that makes its own loss) the hidden states are made whole again

Gradients of what all ranks hold are averaged over dp x sp, as the losses are.

A prompt is shared like any batch, its keys and values put together for the decoding that follows, which every rank does
by itself. Caches other than transformers' dynamic ones are filled by whole prompts.

Legend: B rows, S positions of the whole sequence, D width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.comm.communicator import Communicator
from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.attend import answer_plain_attention, attend_ring, attend_ulysses
from moeweave.parallel.aux_loss import add_balance_loss, balances, check_routers
from moeweave.parallel.hf.attention import cache_of, fills_by_shards, keeping_shards, masks_by_block, route_attention
from moeweave.parallel.mesh import Mesh, MeshSizes
from moeweave.parallel.mixers import attentions_of, layers_of, num_heads, refuse_own_parameters
from moeweave.parallel.plan import Plan
from moeweave.parallel.shards import Shards
from moeweave.parallel.span import Span, current_span, spanning
from moeweave.parallel.stages import Hole
from moeweave.parallel.ulysses import check_heads


def shares_sequence(sizes: MeshSizes, plan: Plan) -> bool:
    """Whether ranks hold different positions of one sequence."""
    return sizes.sp > 1 or (plan.tp_sequence and sizes.tp > 1)


def check_sequence(model: nn.Module, blocks: list[MoEBlock], sizes: MeshSizes, plan: Plan) -> dict[str, nn.Module]:
    """The attention modules of layers that can share sequences, by path. Nothing is started or changed.

    Raises:
        UnsupportedModel: no list of layers; something in them mixes positions that cannot be shared.
        ValueError: heads that sp does not divide, under "ulysses".
    """
    attentions = attentions_of(model, layers_of(model, blocks), blocks)
    for path, module in attentions.items() if sizes.sp > 1 else ():
        if plan.sequence == "ring":
            refuse_own_parameters(path, module)
        elif (heads := num_heads(module)) is not None:
            check_heads(heads, path, sizes.sp, sizes.tp)
    return attentions


class SequenceSharing:
    """How a wrapped model's forward passes are shared out.

    Attributes:
        layers: between the first and the last of these hidden states are shards.
        configs: of the model, renamed while it makes its masks under "ring".
        fewest: positions that a sequence must have for every rank to hold one.
        logits: router logits seen by the pass under way, where it adds a balance loss.

    Where passes take turns, `save` and `restore` keep each one's logits and names of its masks apart.
    """

    def __init__(self, model: nn.Module, blocks: list[MoEBlock], mesh: Mesh, plan: Plan) -> None:
        attentions = check_sequence(model, blocks, mesh.sizes, plan)
        self.layers = layers_of(model, blocks)
        self.mesh, self.plan = mesh, plan
        self.is_plain = not attentions
        self.sp = Communicator(mesh.group("sp") if mesh.sizes.sp > 1 else None)
        self.tp = Communicator(mesh.group("tp")) if plan.tp_sequence and mesh.sizes.tp > 1 else None
        self.fewest = self.sp.size * (1 if self.tp is None else self.tp.size)
        self.configs: list[Any] = []
        self.logits: list[Tensor] | None = None
        self._share_attention(attentions)

    def _share_attention(self, attentions: dict[str, nn.Module]) -> None:
        attend = {"ulysses": attend_ulysses, "ring": attend_ring}[self.plan.sequence]
        for path, module in attentions.items() if self.sp.size > 1 else ():
            config = route_attention(path, module, attend)
            if not any(config is each for each in self.configs):
                self.configs.append(config)
        if self.is_plain:
            for layer in self.layers:
                answer_plain_attention(layer, self.plan.sequence)

    def save(self) -> tuple[Any, ...]:
        return self.logits, *(config._attn_implementation_internal for config in self.configs)

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.logits = saved[0]
        for config, name in zip(self.configs, saved[1:], strict=True):
            config._attn_implementation_internal = name

    def begin(self, given: dict[str, Any], record: Any) -> Span | None:
        """The span of a forward pass with these arguments; None if each rank runs whole sequences. Every stage of a
        pipeline finds the same one."""
        cache = cache_of(given)
        if torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "Sequences that ranks share are trained without a key-value cache. Pass use_cache=False."
                )
        elif (given.get("use_cache") and cache is None) or (cache is not None and not fills_by_shards(cache)):
            return None
        ids = given.get("input_ids")
        ids = given.get("inputs_embeds") if ids is None else ids
        if ids is None:
            ids = next(value for value in given.values() if isinstance(value, Tensor))
        rows, length = ids.shape[:2]
        if length < self.fewest and not torch.is_grad_enabled():
            return None
        return self.span(rows, length, joined=not (record.splits_loss and given.get("labels") is not None))

    def span(self, rows: int, length: int, joined: bool = False) -> Span:
        """How sequences of `length` positions are shared out.

        Raises:
            ValueError: fewer positions than ranks.
        """
        if length < self.fewest:
            raise ValueError(
                f"A sequence of {length} positions cannot be shared by sp * tp ({self.fewest}) ranks: each needs one. "
                "Pad the batch, or choose a smaller sp."
            )
        sp = Shards(length, self.sp, zigzag=self.plan.sequence == "ring" and length >= 2 * self.fewest)
        return Span(rows, sp, None if self.tp is None else Shards(sp.held, self.tp), joined)


def install_sequence(model: Any, routers: list[nn.Module], sharing: SequenceSharing, record: Any) -> None:
    """Make every forward pass of `model` a shared one; `routers` are those of its balance loss."""
    for layer in sharing.layers:
        if not isinstance(layer, Hole):
            names = list(inspect.signature(type(layer).forward).parameters)[1:]
            hook = functools.partial(_cut_arguments, names, layer is sharing.layers[0])
            layer.register_forward_pre_hook(hook, with_kwargs=True)
    sharing.layers[-1].register_forward_hook(_leave)
    for router in routers:
        router.register_forward_hook(functools.partial(_see_router, sharing))
    own, signature = model.forward, inspect.signature(model.forward)
    takes_cache = "use_cache" in signature.parameters

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        span = sharing.begin(given, record)
        if span is None:
            return own(*args, **kwargs)
        if takes_cache and cache_of(given) is None:
            kwargs["use_cache"] = False
        with nullcontext() if (cache := cache_of(given)) is None else keeping_shards(cache, span.sp):
            return _balanced(model, sharing, record, given, span, lambda more: own(*args, **{**kwargs, **more}))

    model.forward = forward


def _balanced(
    model: nn.Module,
    sharing: SequenceSharing,
    record: Any,
    given: dict[str, Any],
    span: Span,
    run: Callable[[dict[str, Any]], Any],
) -> Any:
    """The output of `run(further keywords)` over the shared sequence. A balance loss is made of the router logits here:
    the model would take a shard's for those of whole sequences."""
    balanced = balances(model, given)
    if balanced:
        check_routers(record)
    sharing.logits = [] if balanced else None
    by_block = record.plan.sequence == "ring" and sharing.configs
    try:
        with spanning(span), masks_by_block(sharing.configs) if by_block else nullcontext():
            output = run({"output_router_logits": False} if balanced else {})
        if sharing.logits is not None:
            mask = given.get("attention_mask")
            mask = span.tokens(mask) if isinstance(mask, Tensor) and mask.dim() == 2 else None
            add_balance_loss(output, sharing.logits, mask, record)
    finally:
        sharing.logits = None
    return output


def _cut_arguments(names: list[str], first: bool, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Of the arguments of a layer, called `names`, what belongs to this rank's positions."""
    span = current_span()
    if span is None:
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden = given[names[0]]
    cut = {name: span.argument(type(layer).__name__, name, given[name]) for name in given if name != names[0]}
    cut[names[0]] = span.enter(hidden) if first else hidden
    return tuple(cut[name] for name in names[: len(args)]), {name: cut[name] for name in kwargs}


def _leave(layer: nn.Module, args: Any, output: Any) -> Any:
    span = current_span()
    if span is None:
        return output
    return (span.leave(output[0]), *output[1:]) if isinstance(output, tuple) else span.leave(output)


def _see_router(sharing: SequenceSharing, module: nn.Module, args: Any, output: Any) -> None:
    if sharing.logits is not None:
        sharing.logits.append(output[0] if isinstance(output, tuple) else output)
