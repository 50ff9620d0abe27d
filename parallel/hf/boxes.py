"""Which part of a whole tensor a rank holds: boxes, half-open intervals [start, stop) per dim.

A plain tensor is held whole: one box. A DTensor shard is one box too, unless strided placements scatter it, or unless
its rows are slots that hold the experts in an order of their own (`Slots`): then each row is the box of its expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from moeweave.comm.communicator import Communicator

Box = tuple[tuple[int, int], ...]
Slots = tuple[int, ...]  # the expert in each row of a tensor, where a plan has placed them


def whole(shape: Sequence[int]) -> Box:
    """The box of all of a tensor of this shape."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def box_slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def intersect(one: Box, other: Box) -> Box | None:
    """What both boxes hold, None when that is nothing."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def contains(outer: Box, inner: Box) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True)) or 0 in box_shape(inner)


def shift(box: Box, origin: Box) -> Box:
    """The box as seen from the start of `origin`."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, origin, strict=True))


def whole_shape(tensor: torch.Tensor, slots: Slots | None = None) -> torch.Size:
    """Shape of the whole tensor, with a row an expert."""
    return tensor.shape if slots is None else torch.Size((len(set(slots)), *tensor.shape[1:]))


def by_expert(pieces: list[tuple[Box, torch.Tensor]], slots: Slots | None) -> list[tuple[Box, torch.Tensor]]:
    """Pieces by slots -> pieces by experts: each row a piece of its own, at the place of its expert."""
    if slots is None:
        return pieces
    return [
        (((slots[at], slots[at] + 1), *box[1:]), view[row : row + 1])
        for box, view in pieces
        for row, at in enumerate(range(*box[0]))
    ]


def rows_by_expert(tensor: torch.Tensor, slots: Slots | None) -> torch.Tensor:
    """A whole tensor with a row a slot -> with a row an expert."""
    if slots is None:
        return tensor
    return tensor[torch.tensor([slots.index(expert) for expert in range(len(set(slots)))], device=tensor.device)]


def local_pieces(tensor: torch.Tensor, slots: Slots | None = None) -> list[tuple[Box, torch.Tensor]]:
    """The boxes of the whole tensor that this rank holds, each with the view of local memory that stores it. With
    several slots of an expert, a box may come more than once.

    Raises RuntimeError when the local tensor has another shape than its placements say.
    """
    if slots is not None:
        return by_expert(local_pieces(tensor), slots)
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return [(whole(tensor.shape), tensor)]
    local = tensor.to_local()
    runs = shard_runs(tensor.shape, tensor.device_mesh, tensor.placements)
    held = [sum(b - a for a, b in dim) for dim in runs]
    if tuple(held) != tuple(local.shape) and local.numel() + torch.Size(held).numel() > 0:
        raise RuntimeError(
            f"a DTensor of shape {tuple(tensor.shape)} placed {tensor.placements} holds {tuple(local.shape)} locally, "
            f"expected {tuple(held)}."
        )
    return [(box, local[at]) for box, at in _boxes_of(runs) if local[at].numel()]


def whole_tensor(tensor: torch.Tensor, slots: Slots | None = None) -> torch.Tensor:
    """All of a tensor, on every rank of its mesh. A collective of these ranks."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = gather_axes(tensor)[1] if in_pieces(tensor) else tensor.full_tensor()
    return rows_by_expert(tensor, slots)


def in_pieces(tensor: DTensor) -> bool:
    """Whether a rank's shard may lie in several pieces: torch before 2.13 cannot put these together."""
    names = tensor.device_mesh.mesh_dim_names or ()
    return "etp" in names and isinstance(tensor.placements[names.index("etp")], _StridedShard)


def gather_axes(tensor: DTensor, kept: Sequence[int] = ()) -> tuple[Box, torch.Tensor]:
    """What this rank holds once shards over all mesh axes but `kept` are gathered: one box and its numbers. Shards must
    be of one size. A collective of the mesh's ranks."""
    mesh, placements, stacked = tensor.device_mesh, tensor.placements, tensor.to_local().detach()
    own = mesh.get_coordinate()
    assert own is not None, "this rank is not part of the mesh"
    axes = [axis for axis, one in enumerate(placements) if axis not in kept and not isinstance(one, Replicate)]
    for axis in axes:
        stacked = Communicator(mesh.get_group(axis)).all_gather(stacked)
    left = [one if axis in kept else Replicate() for axis, one in enumerate(placements)]
    (box,) = placed_boxes(tensor.shape, mesh, left)
    out = stacked.new_empty(box_shape(box))
    for index in product(*(range(mesh.size(axis)) for axis in reversed(axes))):
        coordinate = list(own)
        for axis, at in zip(reversed(axes), index, strict=True):
            coordinate[axis] = at
        for part, slices in _boxes_of(shard_runs(tensor.shape, mesh, placements, coordinate)):
            out[box_slices(shift(part, box))] = stacked[index][slices]
    return box, out


def _boxes_of(runs: list[list[tuple[int, int]]]) -> list[tuple[Box, tuple[slice, ...]]]:
    """The boxes that intervals per dim make, and where each lies in the shard."""
    return [
        (
            tuple(run for run, _ in combination),
            tuple(slice(at, at + stop - start) for (start, stop), at in combination),
        )
        for combination in product(*(_with_offsets(dim) for dim in runs))
    ]


def placed_boxes(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> list[Box]:
    """The boxes that this rank holds of a tensor placed so."""
    return [box for box in product(*shard_runs(shape, mesh, placements)) if 0 not in box_shape(box)]


def shard_runs(
    shape: Sequence[int],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    coordinate: Sequence[int] | None = None,
) -> list[list[tuple[int, int]]]:
    """Per dim, the intervals that the rank at `coordinate` (default: this rank) holds, in local order.

    Example: shape (8,) on mesh (edp=2, ep=2) placed (_StridedShard(0, split_factor=2), Shard(0)) at coordinate (1, 0)
    gives [[(2, 4)]].

    Raises RuntimeError for a placement that is neither replicated nor sharded.
    """
    at = mesh.get_coordinate() if coordinate is None else coordinate
    assert at is not None, "this rank is not part of the mesh"
    indices = [torch.arange(size) for size in shape]
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, _StridedShard):
            split: Shard = _StridedShard(0, split_factor=placement.split_factor)  # type: ignore[assignment]
        elif isinstance(placement, Shard):
            split = Shard(0)
        else:
            raise RuntimeError(f"placement {placement} of a parameter cannot be saved or loaded: reduce it first.")
        dim = placement.dim % len(shape)
        parts, _ = split._split_tensor(indices[dim], mesh.size(axis), with_padding=False, contiguous=False)
        indices[dim] = parts[at[axis]]
    return [_runs(index) for index in indices]


def _runs(index: torch.Tensor) -> list[tuple[int, int]]:
    if index.numel() == 0:
        return [(0, 0)]
    breaks = (index.diff() != 1).nonzero().flatten() + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in index.tensor_split(breaks)]


def _with_offsets(runs: list[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    at, placed = 0, []
    for start, stop in runs:
        placed.append(((start, stop), at))
        at += stop - start
    return placed
