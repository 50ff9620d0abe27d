"""Cuts a live model into pipeline stages without rewriting it.

Every stage runs the model's own forward on the batch, so masks, positions and rotary embeddings are computed where they
are needed. Layers of other stages are holes that hand the hidden states on: the one before a stage's first layer puts
in what was received, the one after its last layer takes out what is sent. Names of parameters stay.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moeweave.parallel.adapter import MoEBlock, UnsupportedModel
from moeweave.parallel.schedules import Layout
from moeweave.parallel.span import current_span
from moeweave.parallel.stage_ties import Tie, find_tie


class Hole(nn.Module):
    """Where another stage has a layer, norm or head: hands its first argument on. Plain attributes (the kind of
    attention, say) are the original's. In the place of layer `index` it counts the positions in a cache of keys and
    values, of which it keeps none: those of the whole sequence, where ranks share one."""

    def __init__(self, original: nn.Module, index: int | None = None) -> None:
        super().__init__()
        self.index = index
        for name, value in vars(original).items():
            if not name.startswith("_") and isinstance(value, (str, int, float)):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        cache = next((value for value in kwargs.values() if hasattr(value, "get_seq_length")), None)
        if self.index is not None and cache is not None:
            span = current_span()
            length = hidden.shape[1] if span is None else span.sp.length
            empty_BHSD = hidden.new_zeros(hidden.shape[0], 1, length, 1)
            cache.update(empty_BHSD, empty_BHSD, self.index)
        return hidden


@dataclass
class Border:
    """Hidden states [B, S, D] that the stage under way has received and will send; router logits it has seen."""

    received: Tensor | None = None
    sent: Tensor | None = None
    logits: list[Tensor] | None = None
    running: bool = False


class _Receives(Hole):
    """Gives the received hidden states whatever it is called with."""

    def __init__(self, original: nn.Module, border: Border, index: int | None = None) -> None:
        super().__init__(original, index)
        self.border = border

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.index is not None:
            super().forward(*args, **kwargs)
        return self.border.received


class _Blank(_Receives):
    """In place of an embedding: zeros of the shape that it gives, so that masks and positions come out right."""

    def __init__(self, original: nn.Module, border: Border) -> None:
        super().__init__(original, border)
        self.width: int = original.embedding_dim  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else next(iter(kwargs.values()))
        assert self.border.received is not None
        return self.border.received.new_zeros(1).expand(*ids.shape, self.width)


class _Sends(Hole):
    """Keeps the hidden states that it is called with."""

    def __init__(self, original: nn.Module, border: Border, index: int) -> None:
        super().__init__(original, index)
        self.border = border

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = super().forward(*args, **kwargs)
        if not isinstance(hidden, Tensor):
            raise UnsupportedModel(f"layers that return {type(hidden).__name__} cannot be cut into stages. Set pp=1.")
        self.border.sent = hidden
        return hidden


@dataclass
class Cut:
    """One rank's share of a model.

    Attributes:
        border: shared by the rank's stages.
        views: by stage, what stands at (parent, name) while that stage runs.
        parts: by stage, the modules with parameters that it runs.
        shares: by stage of the whole pipeline, its layers' indices.
        tie: of the first stage's embeddings and the last one's head.
    """

    border: Border
    shares: list[range]
    tie: Tie | None = None
    views: dict[int, list[tuple[nn.Module, str, nn.Module]]] = field(default_factory=dict)
    parts: dict[int, list[nn.Module]] = field(default_factory=dict)

    @contextmanager
    def viewing(self, stage: int) -> Iterator[None]:
        """The model has the layers of `stage` alone inside."""
        saved = [(parent, name, parent._modules[name]) for parent, name, _ in self.views[stage]]
        for parent, name, module in self.views[stage]:
            parent._modules[name] = module
        self.border.running = True
        try:
            yield
        finally:
            self.border.running = False
            for parent, name, original in saved:
                parent._modules[name] = original


def cut_model(model: nn.Module, blocks: list[MoEBlock], layout: Layout, rank: int, top_k: int) -> Cut:
    """Keep the layers of this rank's stages, the embeddings with the first stage and the rest with the last, in place.

    Raises:
        UnsupportedModel: no single list of layers, tied weights other than embeddings and head, parameters outside of
            modules that can be left out.
        ValueError: fewer layers than stages.
    """
    layers = layer_list(model, blocks)
    _refuse_cross_layer(layers)
    before, after = _outside(model, layers)
    units = [*layers, *(parent._modules[name] for parent, name in before + after)]
    tie = find_tie(model, sorted(filter(None, units), key=lambda unit: type(unit) is not nn.Embedding))
    costs = [_cost(layer, blocks, top_k) for layer in layers]
    head_cost = sum(_cost(parent._modules[name], [], top_k) for parent, name in after)
    shares = share_out(costs, layout.num_stages, 0, head_cost)
    cut = Cut(Border(), shares, tie)
    last = layout.num_stages - 1
    mine = layout.stages_of(rank)
    originals = list(layers)
    for stage in mine:
        view: list[tuple[nn.Module, str, nn.Module]] = [
            (layers, str(i), _entry(i, shares[stage], each, cut.border)) for i, each in enumerate(originals)
        ]
        parts = [originals[i] for i in shares[stage]]
        for slots, home, stub in ((before, 0, _Blank), (after, last, None)):
            for parent, name in slots:
                module = parent._modules[name]
                assert module is not None
                if stage == home:
                    parts.append(module)
                else:
                    view.append((parent, name, Hole(module) if stub is None else stub(module, cut.border)))
        cut.views[stage], cut.parts[stage] = view, parts
    kept = {id(module) for stage in mine for module in cut.parts[stage]}
    slots = [(layers, str(i)) for i in range(len(originals))] + before + after
    for parent, name in slots:
        module = parent._modules[name]
        assert module is not None
        if id(module) not in kept:
            parent._modules[name] = Hole(module)
    return cut


def share_out(costs: list[int], num_stages: int, first: int, last: int) -> list[range]:
    """Contiguous layers for each stage such that the costliest stage costs least; at least one layer each.

    Args:
        costs: of each layer. first, last: what the first and the last stage have besides.

    Raises:
        ValueError: fewer layers than stages.
    """
    num_layers = len(costs)
    if num_layers < num_stages:
        raise ValueError(
            f"pp asks for {num_stages} stages, and the model has {num_layers} layers: every stage needs one. "
            f"The number of stages can be 1 to {num_layers} (interleaved, zero_bubble and dualpipev have 2 a rank)."
        )
    # best[n]: (cost of the costliest stage, starts) with the first n layers on the stages so far.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for stage in range(num_stages):
        extra = (first if stage == 0 else 0) + (last if stage == num_stages - 1 else 0)
        best = {
            end: min(
                (max(best[start][0], sum(costs[start:end]) + extra), [*best[start][1], start])
                for start in best
                if start < end
            )
            for end in range(stage + 1, num_layers + 1)
        }
    starts = [*best[num_layers][1], num_layers]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _entry(index: int, share: range, layer: nn.Module, border: Border) -> nn.Module:
    if index in share:
        return layer
    if index == share.start - 1:
        return _Receives(layer, border, index)
    return _Sends(layer, border, index) if index == share.stop else Hole(layer, index)


def layer_list(model: nn.Module, blocks: list[MoEBlock]) -> nn.ModuleList:
    inside = {id(module) for block in blocks for module in block.experts.modules()}
    found: list[nn.ModuleList] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside and any(True for _ in module.parameters()):
            found.append(module)
            inside.update(id(child) for child in module.modules())
    if len(found) != 1:
        raise UnsupportedModel(
            f"pp needs one ModuleList of layers to cut, and {type(model).__name__} has {len(found)}. Set pp=1."
        )
    return found[0]


Slots = list[tuple[nn.Module, str]]


def _outside(model: nn.Module, layers: nn.ModuleList) -> tuple[Slots, Slots]:
    """(parent, name) of the modules with parameters before the layers (embeddings) and after them (norm, head)."""
    inside = {id(module) for module in layers.modules()}
    reached = False
    before: Slots = []
    after: Slots = []
    for path, module in model.named_modules():
        reached |= module is layers
        if id(module) in inside or not any(True for _ in module.parameters(recurse=False)):
            continue
        if module is model or any(id(child) in inside for child in module.modules()):
            raise UnsupportedModel(
                f"{path or type(model).__name__} has parameters of its own beside its layers: pp cannot tell which "
                "stage needs them. Set pp=1."
            )
        if not reached and not isinstance(module, nn.Embedding):
            raise UnsupportedModel(
                f"{path} ({type(module).__name__}) stands before the layers of {type(model).__name__}: pp gives "
                "the first stage embeddings only. Set pp=1."
            )
        home, _, name = path.rpartition(".")
        (before if isinstance(module, nn.Embedding) else after).append((model.get_submodule(home), name))
    return before, after


def _refuse_cross_layer(layers: nn.ModuleList) -> None:
    for layer in layers:
        crossing = [
            name for name in inspect.signature(layer.forward).parameters if name.startswith(("prev_", "shared_"))
        ]
        if crossing:
            raise UnsupportedModel(
                f"{type(layer).__name__} takes {', '.join(crossing)} from the layer before it, which a border between "
                "stages does not carry. Set pp=1."
            )


def _cost(module: nn.Module | None, blocks: list[MoEBlock], top_k: int) -> int:
    """Parameters that a token uses: of the experts, `top_k`."""
    if module is None:
        return 0
    total = sum(param.numel() for param in module.parameters())
    inside = {id(each) for each in module.modules()}
    for block in blocks:
        if id(block.experts) in inside:
            experts = sum(param.numel() for param in block.experts.parameters())
            total -= experts - experts * min(top_k, block.num_experts) // block.num_experts
    return total
