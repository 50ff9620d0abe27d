"""What a model is made of, in numbers, and what of it one rank holds: read off the model, nothing is allocated.

A model is a row of units: what stands before its layers, each layer, what stands after. Pipeline stages are runs of
them. For each unit the numbers are kept apart by who splits them: tp, ep or nobody. Exact for parameters; what a step
saves for its backward is counted as the inputs and outputs of every matrix product that a token passes through.

Legend: D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.data import repeated_blocks
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.plan import Plan
from moeweave.parallel.stages import share_out
from moeweave.parallel.tensor import plan_of, vocabulary


@dataclass
class Unit:
    """Numbers (elements, not bytes) of one run of modules.

    Attributes:
        split, whole, experts: parameters that tp splits, that it does not, and of routed experts.
        active: routed experts' parameters that one token passes through.
        saved, saved_experts: numbers that one token leaves for the backward, outside and inside routed experts.
        moe_blocks: experts modules in it.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0
    active: int = 0
    saved: int = 0
    saved_experts: int = 0
    moe_blocks: int = 0

    @property
    def cost(self) -> int:
        """Parameters that a token uses; what stages are balanced by."""
        return self.split + self.whole + self.active


@dataclass(frozen=True)
class Footprint:
    """Attributes:
    before, layers, after: the model's units, in order.
    dim, vocab: D and the width of the head, 0 without one.
    num_experts, top_k: of the model's routed experts, 0 and 1 without any.
    element_size: bytes of a parameter.
    tied: embeddings and head are one weight.
    """

    before: Unit
    layers: list[Unit]
    after: Unit
    dim: int
    vocab: int
    num_experts: int
    top_k: int
    element_size: int
    tied: bool = False

    def stages(self, pp: int) -> list[list[Unit]]:
        """The units of each pipeline stage, one stage a rank. Raises ValueError for fewer layers than stages."""
        shares = share_out([unit.cost for unit in self.layers], pp, 0, self.after.cost)
        stages = [[self.layers[i] for i in share] for share in shares]
        stages[0].insert(0, self.before)
        stages[-1].append(self.after)
        if self.tied and pp > 1:  # the head's own copy of the embeddings
            stages[-1].append(Unit(split=self.before.split, whole=self.before.whole))
        return stages

    @property
    def active(self) -> int:
        """Parameters that one token passes through, embeddings (a look-up) left out."""
        return sum(unit.cost for unit in (*self.layers, self.after))


def footprint(model: nn.Module, blocks: list[MoEBlock], top_k: int, tp: int = 1) -> Footprint:
    """The footprint of a whole model (it may be on meta), with `tp` ranks to split for.

    Raises:
        UnsupportedModel, ValueError: tp cannot split the model; see `parallel.tensor`.
    """
    layers = repeated_blocks(model, blocks)
    units = [Unit() for _ in range(len(layers) + 2)]
    home = {id(module): i for i, layer in enumerate(layers, 1) for module in layer.modules()}
    split = _split_params(model, blocks, tp) if tp > 1 else set()
    experts = {id(param): block for block in blocks for param in expert_params(block)}
    embedding, head = vocabulary(model, 1)
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    seen: set[int] = set()
    reached = False
    for module in model.modules():
        reached |= id(module) in home
        unit = units[home.get(id(module), len(units) - 1 if reached else 0)]
        for param in module.parameters(recurse=False):
            if id(param) not in seen:
                seen.add(id(param))
                _count(unit, param, experts.get(id(param)), id(param) in split, top_k)
        if type(module) is nn.Linear and id(module.weight) not in experts:
            unit.saved += module.in_features + module.out_features
    for block in blocks:
        units[home.get(id(block.experts), len(units) - 1)].moe_blocks += 1
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    first = next(model.parameters())
    return Footprint(
        before=units[0],
        layers=units[1:-1],
        after=units[-1],
        dim=tables[0].embedding_dim if tables else first.shape[-1],
        vocab=0 if head is None else head.out_features,
        num_experts=blocks[0].num_experts if blocks else 0,
        top_k=top_k,
        element_size=first.element_size(),
        tied=tied,
    )


def weights_of_rank(found: Footprint, sizes: MeshSizes, plan: Plan) -> tuple[float, float]:
    """(numbers of routed experts, numbers of the rest) on a rank of the fullest stage."""
    held = [(_experts(stage, sizes, plan), _dense(stage, sizes, plan)) for stage in found.stages(sizes.pp)]
    return max(held, key=sum)


def stage_weights(stage: Iterable[Unit], sizes: MeshSizes, plan: Plan) -> float:
    """Numbers of a rank's parameters in one stage."""
    return _experts(stage, sizes, plan) + _dense(stage, sizes, plan)


def expert_params(block: MoEBlock) -> list[nn.Parameter]:
    """Parameters that belong to single experts of a block."""
    named = block.experts.named_parameters()
    return [param for name, param in named if block.kind == "modulelist" or name in block.params]


def _count(unit: Unit, param: Tensor, block: MoEBlock | None, split: bool, top_k: int) -> None:
    if block is None:
        unit.split += param.numel() if split else 0
        unit.whole += 0 if split else param.numel()
        return
    unit.experts += param.numel()
    used = min(top_k, block.num_experts)
    unit.active += param.numel() * used // block.num_experts
    if block.kind == "modulelist":
        unit.saved_experts += sum(param.shape) * used // block.num_experts if param.dim() == 2 else 0
    elif param.dim() == 3:
        unit.saved_experts += used * (param.shape[1] + param.shape[2])


def _split_params(model: nn.Module, blocks: list[MoEBlock], tp: int) -> set[int]:
    styles, _ = plan_of(model, blocks, tp)
    modules = [model.get_submodule(path) for path in styles] + [m for m in vocabulary(model, tp) if m is not None]
    return {id(param) for module in modules for param in module.parameters(recurse=False)}


def _experts(stage: Iterable[Unit], sizes: MeshSizes, plan: Plan) -> float:
    numbers = sum(unit.experts for unit in stage)
    if sizes.ep * sizes.etp * sizes.tp == 1:
        return numbers / (sizes.dp if plan.data == "fsdp2" else 1)
    return numbers / (sizes.ep * sizes.etp) / (sizes.edp if plan.data == "fsdp2" else 1)


def _dense(stage: Iterable[Unit], sizes: MeshSizes, plan: Plan) -> float:
    numbers = sum(unit.split / sizes.tp + unit.whole for unit in stage)
    return numbers / (sizes.dp if plan.data == "fsdp2" else 1)
