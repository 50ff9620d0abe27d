"""The facts that `moeweave-inspect` prints: what a block is, who keeps which part of it, and what that weighs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby

from torch import Tensor, nn

from moeweave.parallel.adapter import MoEBlock, is_gated
from moeweave.parallel.footprint import expert_params, footprint, weights_of_rank
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.parallelize import top_k_of
from moeweave.parallel.plan import Plan

HOW_THEY_RUN = {
    "packed": "fast path: one grouped GEMM a projection, on rows sorted by expert",
    "stacked": "fallback: the module's own forward on this rank's slices (it sorts the rows once more)",
    "modulelist": "fallback: expert by expert, each on its own rows",
}


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters; `experts_active` is what one token passes through."""

    dense: int
    experts: int
    experts_active: int


def alike(blocks: list[MoEBlock], model: nn.Module) -> list[list[MoEBlock]]:
    """Blocks in runs that differ in the numbers of their paths alone."""
    return [list(run) for _, run in groupby(blocks, key=lambda block: _identity(block, model))]


def common_path(paths: list[str]) -> str:
    """model.layers.0.mlp, model.layers.1.mlp, model.layers.2.mlp -> model.layers.{0-2}.mlp"""
    split = [path.split(".") for path in paths]
    parts = []
    for column in zip(*split, strict=True):
        numbers = [int(part) for part in column if part.isdigit()]
        if len(set(column)) == 1:
            parts.append(column[0])
        elif len(numbers) == len(column) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            parts.append(f"{{{numbers[0]}-{numbers[-1]}}}")
        else:
            parts.append(f"{{{','.join(column)}}}")
    return ".".join(parts)


def facts(block: MoEBlock, model: nn.Module, repeats: int) -> Iterator[tuple[str, str]]:
    """(name, value) rows of one block."""
    experts = block.experts
    yield "experts", f"{type(experts).__name__}: {block.num_experts}, {top_k_of(model)} to each token"
    yield "blocks", f"{repeats}"
    yield "router", _named(block.router_path, model) or "in the block itself"
    for name, shape in _shapes(block):
        yield f"  {name}", shape
    if block.kind == "packed":
        yield "packing", _packing(experts)
        yield "activation", type(experts.act_fn).__name__ if hasattr(experts, "act_fn") else "the module's own"
    yield "bias", "yes" if any("bias" in name for name, _ in experts.named_parameters()) else "no"
    yield "shared experts", ", ".join(filter(None, (_named(path, model) for path in block.shared_paths))) or "none"
    if block.correction_bias is not None:
        yield "choice-only bias", _any_layer(".".join(block.correction_bias))
    yield "runs by", HOW_THEY_RUN[block.kind]


def count(model: nn.Module, blocks: list[MoEBlock]) -> Counts:
    """Parameters of the experts and of the rest; tied ones count once."""
    experts = sum(param.numel() for block in blocks for param in expert_params(block))
    dense = sum(param.numel() for param in model.parameters()) - experts
    active = sum(
        param.numel() * min(top_k_of(model), block.num_experts) // block.num_experts
        for block in blocks
        for param in expert_params(block)
    )
    return Counts(dense, experts, active)


def placements(
    model: nn.Module, blocks: list[MoEBlock], sizes: MeshSizes, plan: Plan
) -> Iterator[tuple[str, str, str, str]]:
    """(parameters, shape, placement, shape on each rank) rows: experts by parameter, the rest as one."""
    copies = sizes.edp * sizes.dp_replicate
    for same in alike(blocks, model):
        where = common_path([block.path for block in same])
        for name, param in _own_params(same[0]):
            how = f"experts over ep={sizes.ep}" if sizes.ep > 1 else _data_placement(sizes, plan)
            if sizes.ep > 1 and copies > 1:
                kept = f"FSDP2 over edp={sizes.edp}" if plan.data == "fsdp2" else f"{sizes.edp} copies"
                how += f", then {kept}" if sizes.edp > 1 else ""
                how += f", {sizes.dp_replicate} replicas" if sizes.dp_replicate > 1 else ""
            if same[0].kind == "modulelist":
                local = f"{same[0].num_experts // sizes.ep} of {same[0].num_experts} experts"
            else:
                local = f"{_share(param, True, sizes, plan):,} numbers"
            yield f"{where}.{name}", str(list(param.shape)), how, local
    counts = count(model, blocks)
    _, held = weights_of_rank(footprint(model, blocks, top_k_of(model), sizes.tp), sizes, plan)
    yield (
        "all others",
        f"{counts.dense:,} numbers",
        _dense_placement(sizes, plan),
        f"{math.ceil(held):,} numbers",
    )


def memory(
    model: nn.Module, blocks: list[MoEBlock], sizes: MeshSizes, plan: Plan
) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """(name, bytes of weights, gradients, Adam states and their sum) on a rank of the fullest stage."""
    found = footprint(model, blocks, top_k_of(model), sizes.tp)
    numbers = weights_of_rank(found, sizes, plan)
    for name, held in (("experts", numbers[0]), ("the rest", numbers[1]), ("all", sum(numbers))):
        weights = math.ceil(held) * found.element_size
        yield name, (weights, weights, 2 * weights, 4 * weights)


def gib(number: int) -> str:
    """A number of bytes for people: 12.3 GiB, 45.6 MiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"


def shown(sizes: MeshSizes) -> str:
    """dp=8, ep=8"""
    return ", ".join(f"{name}={size}" for name, size in asdict(sizes).items() if size > 1) or "no parallelism"


# ---- how much of a parameter a rank holds


def _share(param: Tensor, is_expert: bool, sizes: MeshSizes, plan: Plan) -> int:
    """Numbers of `param` on one rank."""
    if is_expert and sizes.ep > 1:
        return math.ceil(param.numel() / sizes.ep / (sizes.edp if plan.data == "fsdp2" else 1))
    return math.ceil(param.numel() / _dense_shards(sizes, plan))


def _dense_shards(sizes: MeshSizes, plan: Plan) -> int:
    return sizes.dp * sizes.sp if plan.data == "fsdp2" else 1


def _dense_placement(sizes: MeshSizes, plan: Plan) -> str:
    outer = [f"{sizes.pp} stages"] if sizes.pp > 1 else []
    outer += [f"layers that tp={sizes.tp} splits over it"] if sizes.tp > 1 else []
    inner = _data_placement(sizes, plan)
    return ", ".join([*outer, *([inner] if inner != "whole" or not outer else [])])


def _data_placement(sizes: MeshSizes, plan: Plan) -> str:
    shards = sizes.dp * sizes.sp
    if shards * sizes.dp_replicate == 1:
        return "whole"
    if plan.data == "ddp":
        return f"{shards * sizes.dp_replicate} copies (DDP)"
    replicas = f", {sizes.dp_replicate} replicas (HSDP)" if sizes.dp_replicate > 1 else ""
    return f"FSDP2 over {f'dp={sizes.dp}' if sizes.sp == 1 else f'dp * sp={shards}'}{replicas}"


def _own_params(block: MoEBlock) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that belong to single experts, by name under the block; a ModuleList shows its first expert's."""
    for name, param in block.experts.named_parameters():
        if block.kind == "modulelist":
            if re.search(r"(^|\.)0\.", name):
                yield re.sub(r"(^|\.)0\.", r"\1*.", name, count=1), param
        elif name in block.params:
            yield name, param


# ---- words for a block


def _identity(block: MoEBlock, model: nn.Module) -> tuple[object, ...]:
    path = re.sub(r"\d+", "#", block.path)
    shared = tuple(_named(path, model) for path in block.shared_paths)
    return (path, type(block.experts), block.num_experts, block.kind, tuple(_shapes(block)), shared)


def _shapes(block: MoEBlock) -> list[tuple[str, str]]:
    return [(name, f"{list(param.shape)} {str(param.dtype)[6:]}") for name, param in _own_params(block)]


def _packing(experts: nn.Module) -> str:
    halves = {True: ", as two halves", False: ", interleaved", None: ""}[getattr(experts, "is_concatenated", None)]
    packed = f"gate and up in one{halves}" if is_gated(experts) else "up alone, no gate"
    return f"{packed}; axes are [expert, {'in, out' if experts.is_transposed else 'out, in'}]"


def _named(path: str | None, model: nn.Module) -> str:
    if path is None:
        return ""
    return f"{_any_layer(path)} ({type(model.get_submodule(path)).__name__})"


def _any_layer(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", path)
