"""Which meshes fit a model on so many ranks, with estimated memory and communication: arithmetic, nothing runs.

    memory          weights, gradients and Adam states (exact), what the backward needs, one gathered unit, logits
    communication   bytes that a rank sends in a step, by axis, over the slowest link that the axis crosses
    step            matrix products, the pipeline's bubble, and communication, all in sequence but for FSDP's gathers

Estimates rank meshes against each other; they do not predict a step's time to the millisecond. Ranks lie as `Mesh`
numbers them: tp innermost, then sp, dp, replicas, and stages outermost.

Legend: T tokens of a rank's micro-batch, D width of a token.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from torch import nn

from moeweave.comm.cost import remote_ranks
from moeweave.parallel.adapter import UnsupportedModel, find_moe_blocks
from moeweave.parallel.footprint import Footprint, Unit, footprint, stage_weights
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.parallelize import top_k_of
from moeweave.parallel.plan import Plan
from moeweave.parallel.sequence import check_sequence
from moeweave.parallel.stages import layer_list

STATES = 4  # weights, gradients and two moments of Adam, all in the parameters' dtype


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What estimates assume of a rank. Defaults: an H100 or H200 in a host of eight, with one 400 Gbit/s card a rank.

    Attributes:
        ranks_per_node: ranks joined by the fast links of one host.
        flops: matrix products a second in the compute dtype, as layers of this kind reach them.
        scaleup, scaleout: bytes a second and direction of one rank inside a host and between hosts.
    """

    ranks_per_node: int = 8
    flops: float = 4e14
    scaleup: float = 3e11
    scaleout: float = 4e10

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"Hardware.{name} ({value}) must be positive.")


@dataclass(frozen=True)
class Suggestion:
    """A mesh and plan, and what they would cost a rank.

    Attributes:
        sizes: the mesh: `mw.Mesh(**suggestion.mesh)`.
        plan: the plan.
        microbatches: of a sequence each, that a data rank runs in a step.
        memory: estimated bytes of the fullest rank.
        states: bytes of its weights, gradients and Adam states.
        sent: bytes that a rank sends in a step, by axis ("fsdp", "experts", "ep", "tp", "sp", "pp").
        bubble: share of the step that a pipeline stage waits.
        seconds: estimated time of a step.
    """

    sizes: MeshSizes
    plan: Plan
    microbatches: int
    memory: int
    states: int
    sent: dict[str, int] = field(default_factory=dict)
    bubble: float = 0.0
    seconds: float = 0.0

    @property
    def mesh(self) -> dict[str, int]:
        """The axes above one, as `Mesh` takes them."""
        return {name: size for name, size in asdict(self.sizes).items() if size > 1}


def suggest(
    model: nn.Module,
    world: int,
    memory_per_rank: int,
    tokens: int,
    *,
    sequence: int = 4096,
    hardware: Hardware | None = None,
    limit: int = 8,
) -> list[Suggestion]:
    """Meshes of `world` ranks that hold a training step of `model`, fastest by estimate first.

    tp stays inside a host; sp is tried where a sequence is longer than 8192 tokens. Activation checkpointing is asked
    for where a mesh does not fit without it.

    Args:
        model: not wrapped yet; it may be on the meta device.
        world: ranks.
        memory_per_rank: bytes that a rank has.
        tokens: of all ranks in one step.
        sequence: tokens of a sequence; a micro-batch is one sequence.
        hardware: speeds of computation and links.
        limit: suggestions to return at most.

    Raises:
        ValueError: no mesh fits; the leanest one is named.

    Example:
        >>> best = mw.suggest(model, world=8, memory_per_rank=80 * 2**30, tokens=65536)[0]
        >>> mesh = mw.Mesh(**best.mesh)
    """
    hardware = hardware or Hardware()
    if tokens < sequence:
        raise ValueError(f"tokens ({tokens}) must be at least one sequence ({sequence}). Lower sequence.")
    found = list(_estimates(model, world, tokens, sequence, hardware))
    fitting = [each for each in found if each.memory <= memory_per_rank]
    if not found or not fitting:
        raise ValueError(_nothing_fits(found, world, memory_per_rank))
    best: dict[MeshSizes, Suggestion] = {}
    for each in sorted(fitting, key=lambda each: (each.seconds, each.memory)):
        best.setdefault(each.sizes, each)
    return list(best.values())[:limit]


def _nothing_fits(found: list[Suggestion], world: int, memory: int) -> str:
    if not found:
        return f"world ({world}): no mesh of so many ranks can hold this model and batch. Raise tokens or lower world."
    least = min(found, key=lambda each: each.memory)
    return (
        f"memory_per_rank ({memory / 2**30:.1f} GiB) is too little on {world} ranks: the leanest mesh, {least.mesh}, "
        f"needs about {least.memory / 2**30:.1f} GiB. Use more ranks, or a smaller dtype."
    )


def _estimates(model: nn.Module, world: int, tokens: int, sequence: int, hardware: Hardware) -> Iterator[Suggestion]:
    blocks = find_moe_blocks(model)
    top_k = top_k_of(model)
    prints = {1: footprint(model, blocks, top_k)}
    for tp in _divisors(min(world, hardware.ranks_per_node))[1:]:
        with suppress(ValueError):  # heads or parts that tp cannot split
            prints[tp] = footprint(model, blocks, top_k, tp)
    max_pp = _max_stages(model, prints[1])

    @functools.cache
    def shares(sp: int, tp: int) -> bool:
        with suppress(ValueError):  # heads or parts that sp cannot share
            if sp > 1:
                check_sequence(model, blocks, MeshSizes(sp=sp, tp=tp), Plan())
            return True
        return False

    for sizes in _meshes(world, hardware.ranks_per_node, list(prints), prints[1].num_experts, max_pp, sequence):
        data = sizes.dp * sizes.dp_replicate
        microbatches = tokens // (data * sequence)
        if microbatches < sizes.pp or not shares(sizes.sp, sizes.tp):
            continue
        for recompute in (False, True):
            yield estimate(prints[sizes.tp], sizes, Plan(recompute=recompute), microbatches, sequence, hardware)


def _max_stages(model: nn.Module, found: Footprint) -> int:
    """Stages that the model can be cut into at most, 1 where it cannot."""
    try:
        layer_list(model, find_moe_blocks(model))
    except UnsupportedModel:
        return 1
    return len(found.layers)


def _meshes(
    world: int, per_node: int, tps: list[int], num_experts: int, max_pp: int, sequence: int
) -> Iterator[MeshSizes]:
    sps = _divisors(min(world, per_node)) if sequence > 8192 else [1]
    for tp, sp, pp in itertools.product(tps, sps, _divisors(world)):
        if pp > max_pp or world % (tp * sp * pp):
            continue
        data = world // (tp * sp * pp)
        replicas = {1, max(1, data * sp * tp // per_node)}
        for dp_replicate in sorted(n for n in replicas if data % n == 0):
            regrouped = data // dp_replicate * sp * tp
            for ep in _divisors(regrouped) if num_experts else [1]:
                if num_experts and num_experts % ep:
                    continue
                yield MeshSizes(dp=data // dp_replicate, tp=tp, pp=pp, sp=sp, ep=ep, dp_replicate=dp_replicate)


def estimate(
    found: Footprint, sizes: MeshSizes, plan: Plan, microbatches: int, sequence: int, hardware: Hardware
) -> Suggestion:
    """What one mesh and plan would cost; `found` is the footprint for `sizes.tp`."""
    stages = found.stages(sizes.pp)
    memories = [_memory(found, at, stages, sizes, plan, microbatches, sequence) for at in range(len(stages))]
    states = max(int(STATES * found.element_size * stage_weights(stage, sizes, plan)) for stage in stages)
    sent = _sent(found, stages, sizes, plan, microbatches, sequence)
    tokens = sequence * microbatches / (sizes.sp * sizes.tp)
    passes = 8 if plan.recompute else 6  # forward 2, backward 4, and the forward once more
    costliest = max(sum(unit.cost for unit in stage) for stage in stages)
    compute = passes * costliest * tokens / hardware.flops
    bubble = (sizes.pp - 1) / (microbatches + sizes.pp - 1)
    times = {axis: count / _speed(axis, sizes, hardware) for axis, count in sent.items()}
    hidden = min(compute, times.get("fsdp", 0.0) + times.get("experts", 0.0))
    seconds = (compute + sum(times.values()) - hidden) / (1 - bubble)
    return Suggestion(sizes, plan, microbatches, max(memories), states, sent, bubble, seconds)


def _memory(
    found: Footprint, at: int, stages: list[list[Unit]], sizes: MeshSizes, plan: Plan, microbatches: int, sequence: int
) -> int:
    """Bytes of a rank of stage `at`."""
    stage, size = stages[at], found.element_size
    tokens = sequence / sizes.sp
    under_way = min(microbatches, sizes.pp - at)
    whole = [tokens * _saved(unit, sizes) for unit in stage]
    inputs = tokens * found.dim * len(stage)
    saved = under_way * inputs + max(whole) if plan.recompute else under_way * sum(whole)
    # FSDP gathers the unit that runs and the one after it.
    gathered = 2 * max(unit.split / sizes.tp + unit.whole + unit.experts / (sizes.ep * sizes.etp) for unit in stage)
    gathered = gathered if sizes.dp > 1 and plan.data == "fsdp2" else 0
    logits = 3 * 4 * tokens * found.vocab if at == len(stages) - 1 else 0  # fp32 logits, their softmax and gradient
    states = STATES * stage_weights(stage, sizes, plan)
    return int(size * (states + saved + gathered) + logits)


def _saved(unit: Unit, sizes: MeshSizes) -> float:
    """Numbers that a token leaves for the backward in one unit; each tp rank routes its share of the tokens."""
    return unit.saved / (sizes.tp if unit.split else 1) + unit.saved_experts / sizes.tp


def _sent(
    found: Footprint, stages: list[list[Unit]], sizes: MeshSizes, plan: Plan, microbatches: int, sequence: int
) -> dict[str, int]:
    """Bytes that a rank of the busiest stage sends in a step, by axis; axes that send nothing are left out."""
    size = found.element_size
    rows = sequence * microbatches / sizes.sp * found.dim * size  # a rank's tokens, once
    busiest = max(stages, key=lambda stage: sum(unit.split + unit.whole + unit.experts for unit in stage))
    layers = sum(bool(unit.saved) for unit in busiest)
    forwards = 3 if plan.recompute else 2  # forward, backward, and the forward once more
    dense = size * sum(unit.split / sizes.tp + unit.whole for unit in busiest)
    experts = size * sum(unit.experts for unit in busiest) / (sizes.ep * sizes.etp)
    remote = remote_ranks(found.num_experts, found.top_k, sizes.ep)
    moe_blocks = sum(unit.moe_blocks for unit in busiest)
    sent = {
        # Gathered before forward and backward of each micro-batch, reduced after it; replicas all-reduce their shard.
        "fsdp": dense * (microbatches * 3 * _others(sizes.dp) + 2 * _others(sizes.dp_replicate) / sizes.dp),
        "experts": experts * (microbatches * 3 * _others(sizes.edp) + 2 * _others(sizes.dp_replicate) / sizes.edp),
        "ep": 2 * forwards * moe_blocks * remote * rows / sizes.tp,
        "tp": 2 * forwards * layers * 2 * _others(sizes.tp) * rows,
        "sp": 4 * forwards * layers * _others(sizes.sp) * rows,
        "pp": 2 * rows if sizes.pp > 1 else 0.0,
    }
    return {axis: int(count) for axis, count in sent.items() if count}


def _others(size: int) -> float:
    """Share of a collective's bytes that leaves a rank."""
    return (size - 1) / size


def _speed(axis: str, sizes: MeshSizes, hardware: Hardware) -> float:
    """Bytes a second of the slowest link that an axis crosses: its ranks lie within so many neighbouring ones."""
    inner = sizes.sp * sizes.tp
    span = {
        "tp": sizes.tp,
        "sp": inner,
        "ep": sizes.ep * sizes.etp,
        "fsdp": sizes.dp * sizes.dp_replicate * inner,
        "experts": sizes.dp * sizes.dp_replicate * inner,
        "pp": sizes.world,
    }[axis]
    return hardware.scaleup if span <= hardware.ranks_per_node else hardware.scaleout


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
