"""Which rank holds which experts, from measured load: replicas for the hot ones, then ranks of equal load.

Pure functions of a load table, in the manner of DeepSeek's EPLB (arXiv 2412.19437, 3.4.2). A layer's experts get slots,
`num_slots / num_ranks` on each rank; an expert may have several, and its tokens are shared out over them.

    1. replicas   the spare slots go, one at a time, to the expert with the most load per slot
    2. nodes      with `num_groups`, whole groups of experts are packed onto nodes, so that group-limited routing
                  stays inside few nodes; replicas and ranks are then chosen inside each node
    3. ranks      slots, heaviest first, go to the least loaded rank that has room

Worked example, load [90, 30, 20, 10] on 2 ranks with 6 slots: expert 0 gets 3 slots of 30 each. Ranks get slots of
experts (0, 0, 2) and (0, 1, 3): 80 and 70, where experts (0, 1) and (2, 3) had 120 and 30.

Legend: L layers, E experts, S slots, C slots of an expert at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Attributes:
    expert_of_slot: int64 [L, S], the expert in each slot; slots of a rank are neighbours.
    slots_of_expert: int64 [L, E, C], the slots of each expert in increasing order, padded with -1.
    num_replicas: int64 [L, E], how many of them there are, at least one.
    """

    expert_of_slot: Tensor
    slots_of_expert: Tensor
    num_replicas: Tensor


def place_experts(
    load_LE: Tensor, num_ranks: int, num_slots: int | None = None, *, num_groups: int = 1, num_nodes: int = 1
) -> Placement:
    """Slots for every expert of every layer such that ranks carry equal load, as nearly as greedy choices get.

    Args:
        load_LE: routes (or time) of each expert, any real dtype, at least zero; `mw.expert_load` measures it.
        num_ranks: ranks that share out the slots of a layer (ep).
        num_slots: S, a multiple of num_ranks, at least E; None is E, no replicas.
        num_groups: groups of neighbouring experts that routing chooses by; 1 for none.
        num_nodes: hosts that the ranks lie on, evenly.

    Raises:
        ValueError: sizes that do not divide; fewer slots than experts; a negative or NaN load.
    """
    num_layers, num_experts = load_LE.shape
    num_slots = num_experts if num_slots is None else num_slots
    _check(load_LE, num_ranks, num_slots, num_groups, num_nodes)
    nodes = num_nodes if num_groups % num_nodes == 0 else 1
    groups = num_groups if nodes > 1 else 1
    rows = [_place_layer(load_E, num_ranks, num_slots, groups, nodes) for load_E in load_LE.double().cpu()]
    return invert(torch.tensor(rows, dtype=torch.int64).view(num_layers, num_slots), num_experts)


def place_by_load(
    load: Mapping[str, Tensor | Sequence[float]],
    num_ranks: int,
    num_slots: int | None = None,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> dict[str, list[int]]:
    """`place_experts` for `Plan(placement=...)`: the expert of each slot, by path of the experts.

    Args:
        load: routes of each expert of the global batch, by path: `mw.expert_load` summed over ranks, or the `load` of
            lines of metrics.jsonl.
        num_ranks: ep of the mesh that is to run.
        num_slots, num_groups, num_nodes: as in `place_experts`.

    Raises:
        ValueError: as `place_experts`, of the layer that it names.
    """
    placed = {}
    for path, counts in load.items():
        load_1E = torch.as_tensor(counts).unsqueeze(0)
        try:
            found = place_experts(load_1E, num_ranks, num_slots, num_groups=num_groups, num_nodes=num_nodes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        placed[path] = found.expert_of_slot[0].tolist()
    return placed


def invert(expert_of_slot_LS: Tensor, num_experts: int) -> Placement:
    """The placement that `expert_of_slot_LS` is the forward half of."""
    num_layers, num_slots = expert_of_slot_LS.shape
    replicas_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
    replicas_LE.scatter_add_(1, expert_of_slot_LS, torch.ones_like(expert_of_slot_LS))
    order_LS = torch.argsort(expert_of_slot_LS, dim=1, stable=True)
    sorted_LS = expert_of_slot_LS.gather(1, order_LS)
    starts_LE = replicas_LE.cumsum(1) - replicas_LE
    nth_LS = torch.arange(num_slots).expand(num_layers, -1) - starts_LE.gather(1, sorted_LS)
    slots_LEC = torch.full((num_layers, num_experts, int(replicas_LE.max())), -1, dtype=torch.int64)
    layer_LS = torch.arange(num_layers).unsqueeze(1).expand_as(sorted_LS)
    slots_LEC[layer_LS, sorted_LS, nth_LS] = order_LS
    return Placement(expert_of_slot_LS, slots_LEC, replicas_LE)


def rank_loads(load_LE: Tensor, placement: Placement, num_ranks: int) -> Tensor:
    """Load of each rank, float64 [L, num_ranks], where an expert's replicas share its tokens evenly."""
    share_LE = load_LE.double().cpu() / placement.num_replicas
    load_LS = share_LE.gather(1, placement.expert_of_slot)
    return load_LS.view(load_LS.shape[0], num_ranks, -1).sum(2)


def _place_layer(load_E: Tensor, num_ranks: int, num_slots: int, num_groups: int, num_nodes: int) -> list[int]:
    """The expert of each slot of one layer."""
    experts_of_group = torch.arange(len(load_E)).view(num_groups, -1)
    packed = pack(load_E.view(num_groups, -1).sum(1).tolist(), num_nodes)
    slots: list[int] = []
    for groups in packed:
        experts = experts_of_group[groups].flatten().tolist()
        slots += _place_node(load_E[experts].tolist(), experts, num_ranks // num_nodes, num_slots // num_nodes)
    return slots


def _place_node(loads: list[float], experts: list[int], num_ranks: int, num_slots: int) -> list[int]:
    replicas = replicate(loads, num_slots)
    slots = [i for i, count in enumerate(replicas) for _ in range(count)]
    bins = pack([loads[i] / replicas[i] for i in slots], num_ranks)
    return [experts[slots[j]] for members in bins for j in sorted(members)]


def replicate(loads: list[float], num_slots: int) -> list[int]:
    """Slots of each expert, all `num_slots` given out: [90, 30, 20, 10] and 6 slots give [3, 1, 1, 1]."""
    counts = [1] * len(loads)
    for _ in range(num_slots - len(loads)):
        counts[max(range(len(loads)), key=lambda i: loads[i] / counts[i])] += 1
    return counts


def pack(loads: list[float], num_bins: int) -> list[list[int]]:
    """Items into bins of equal number and about equal load: heaviest first, each to the lightest bin with room."""
    room = len(loads) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0.0] * num_bins
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        to = min((b for b in range(num_bins) if len(bins[b]) < room), key=totals.__getitem__)
        bins[to].append(item)
        totals[to] += loads[item]
    return bins


def _check(load_LE: Tensor, num_ranks: int, num_slots: int, num_groups: int, num_nodes: int) -> None:
    num_experts = load_LE.shape[1]
    if not bool((load_LE >= 0).all()):
        raise ValueError("load_LE must be at least zero everywhere, and not NaN. Pass counts of routes.")
    if num_slots < num_experts or num_slots % num_ranks:
        least = -(-num_experts // num_ranks) * num_ranks
        raise ValueError(
            f"num_slots ({num_slots}) must be a multiple of num_ranks ({num_ranks}) and at least the number of experts "
            f"({num_experts}). Use {least}, or more for replicas."
        )
    for what, size, parts, number in (
        ("experts", num_experts, "num_groups", num_groups),
        ("ranks", num_ranks, "num_nodes", num_nodes),
    ):
        if number < 1 or size % number:
            legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ValueError(f"{parts} ({number}) must divide the {what} ({size}). It can be {legal}.")
