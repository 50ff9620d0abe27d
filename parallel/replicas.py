"""Replicas that train: an expert's slots get the sum of their gradients, so that all of them take the same step.

A slot sees its share of an expert's tokens, so the expert's gradient is the sum over its slots. It is taken last, after
the reduction over copies (edp, dp_replicate):

    1. a rank adds up its own slots of an expert
    2. each of the ranks that hold the expert gets one part of it from all of them, and adds these up (all-to-all)
    3. each gives the sum of its part to all of them (all-to-all), who write the whole into every slot

Each number of a sum is computed once, on one rank, and copied from there: gradients of replicas are bitwise equal
whatever order a back end reduces in, and so are parameters and states of an optimizer that works element by element. A
rank sends 2 (H - 1) / H times the gradient of each expert that it shares with H - 1 others.

EPLB itself is not used in training (deepseek-ai/EPLB issues 9 and 10). Systems that replicate in training choose anew
every step and move weights for it: FasterMoE broadcasts hot experts (PPoPP 2022), SYMI partitions optimizer states over
all ranks (arXiv 2504.19925), LAER-MoE weights (arXiv 2602.11686). Here a placement holds from one checkpoint to the
next, so that slots keep weights and states of their own and gradients alone travel.

Worked example, slots (0, 1 | 0, 2) on two ranks, gradients (a, b | c, d): rank 0 sums the first half of a + c, rank 1
the second; both ranks end with (a + c) in their first slot, and b, d as they were.

Legend: n slots of this rank, F numbers of an expert here, H ranks that hold an expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moeweave.comm.communicator import Communicator
from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.hf.boxes import Slots, shard_runs
from moeweave.parallel.mesh import Mesh, MeshSizes
from moeweave.parallel.plan import Plan

Pair = tuple[int, int]  # (rank, expert that both hold)


def check_replicas(block: MoEBlock, sizes: MeshSizes, plan: Plan) -> None:
    """Raise ValueError where FSDP could shard replicated experts by slots only: a slot must be whole in numbers."""
    if not block.has_replicas or plan.data != "fsdp2" or sizes.edp == 1:
        return
    for name in block.params:
        widths = tuple(block.experts.get_parameter(name).shape[1:])
        if not any(width % sizes.edp == 0 for width in widths):
            raise ValueError(
                f"Plan.placement has replicas at {block.path}, whose copies, edp ({sizes.edp}), must divide a width of "
                f"{name} {widths}. Choose dp or ep such that they do, or use Plan(data='ddp')."
            )


def replica_sums(blocks: list[MoEBlock], mesh: Mesh) -> dict[str, ReplicaSum]:
    """By path of experts, the sum over replicas; of those that have some. A collective, on a group of its own."""
    slots_of = {block.path: block.slots for block in blocks if block.slots is not None and block.has_replicas}
    comm = Communicator(mesh.new_group("ep") if slots_of else None)
    return {path: ReplicaSum(slots, comm) for path, slots in slots_of.items()}


class ReplicaSum:
    """Sums gradients of one layer's experts over their slots.

    Args:
        slots: the expert of each slot; every rank of `comm` holds as many, in the order of ranks.
    """

    def __init__(self, slots: Slots, comm: Communicator) -> None:
        self.comm = comm
        per_rank = len(slots) // comm.size
        own = slots[comm.rank * per_rank : (comm.rank + 1) * per_rank]
        replicated = sorted(expert for expert, count in Counter(slots).items() if count > 1 and expert in own)
        self.rows = {expert: [row for row, each in enumerate(own) if each == expert] for expert in replicated}
        self.holders = {
            expert: sorted({at // per_rank for at, each in enumerate(slots) if each == expert}) for expert in replicated
        }
        self.pairs: list[Pair] = [
            (rank, expert)
            for rank in range(comm.size)
            for expert in replicated
            if rank != comm.rank and rank in self.holders[expert]
        ]

    def sum_(self, grad: Tensor) -> int:
        """Replace gradients [n, ...], contiguous, of replicated experts by their sums, in place. A collective.

        Returns:
            Bytes that this rank has sent.
        """
        grad_nF, me = grad.view(grad.shape[0], -1), self.comm.rank
        parts = {expert: self._parts(expert, grad_nF[rows].sum(0)) for expert, rows in self.rows.items()}
        theirs = {(rank, expert): parts[expert][rank] for rank, expert in self.pairs}
        mine = {(rank, expert): parts[expert][me] for rank, expert in self.pairs}
        arrived = self._swap(theirs, mine, grad)
        sums = {
            # In the order of ranks.
            expert: reduce(torch.add, [own[me] if at == me else arrived[at, expert] for at in self.holders[expert]])
            for expert, own in parts.items()
        }
        given = {(rank, expert): sums[expert] for rank, expert in self.pairs}
        others = self._swap(given, theirs, grad)
        for expert, rows in self.rows.items():
            ordered = [sums[expert] if rank == me else others[rank, expert] for rank in self.holders[expert]]
            grad_nF[rows] = torch.cat(ordered)
        return sum(part.numel() * part.element_size() for sent in (theirs, given) for part in sent.values())

    def _parts(self, expert: int, grad_F: Tensor) -> dict[int, Tensor]:
        """By holder of the expert, the part of its gradient that this holder adds up."""
        holders = self.holders[expert]
        return dict(zip(holders, grad_F.tensor_split(len(holders)), strict=True))

    def _swap(self, sent: Mapping[Pair, Tensor], like: Mapping[Pair, Tensor], of: Tensor) -> dict[Pair, Tensor]:
        """By (rank, expert): what is sent there -> what came from there, of the sizes of `like`."""
        rows = torch.cat([of.new_empty(0), *sent.values()])
        received, _ = self.comm.all_to_all(rows, self._splits(sent), self._splits(like))
        return dict(zip(like, received.split([part.numel() for part in like.values()]), strict=True))

    def _splits(self, pieces: Mapping[Pair, Tensor]) -> list[int]:
        sizes = [0] * self.comm.size
        for (rank, _), piece in pieces.items():
            sizes[rank] += piece.numel()
        return sizes


def counted_slots(grad: Tensor, slots: Slots) -> Tensor:
    """bool [n]: which rows of a rank's shard are the first slot of their expert, the one that a norm counts."""
    whole = [(0, len(slots))]
    runs = shard_runs(grad.shape, grad.device_mesh, grad.placements)[0] if isinstance(grad, DTensor) else whole
    first = [slots.index(slots[at]) == at for start, stop in runs for at in range(start, stop)]
    return torch.tensor(first, device=grad.device)
