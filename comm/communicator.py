"""Collectives over one torch.distributed group, in the shapes that token exchange needs.

Each traffic class (dispatch, combine, gradients) gets a communicator over a group of its own, so that two of them can
be under way at once without one waiting in the other's queue. A communicator over no group is this rank alone: every
collective is then the identity and copies nothing.

Legend: N rows here, W ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# torch 2.13 renamed the two; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_group_called: Callable[[str], dist.ProcessGroup] = distributed_c10d._resolve_process_group  # type: ignore[assignment]


class Communicator:
    """Collectives over `group`; `None` means this rank alone.

    Attributes:
        name: the group's name, "" when alone. Custom operators carry it instead of the group (they take no objects).
        rank, size: this rank's position in the group, and the number of its ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.name: str = "" if group is None or self.size == 1 else group.group_name

    @staticmethod
    def named(name: str) -> Communicator:
        """The communicator of the group called `name`; "" is this rank alone."""
        return _ALONE if name == "" else Communicator(_group_called(name))

    def all_to_all(
        self, rows: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], async_op: bool = False
    ) -> tuple[Tensor, dist.Work | None]:
        """Rows [N, ...] by destination -> rows [sum(recv_splits), ...] by source, and the work to wait for."""
        if self.size == 1:
            return rows, None
        received = rows.new_empty((sum(recv_splits), *rows.shape[1:]))
        work = dist.all_to_all_single(
            received, rows.contiguous(), list(recv_splits), list(send_splits), group=self.group, async_op=async_op
        )
        return received, work

    def swap(self, counts_WE: Tensor) -> Tensor:
        """Row w of the result is what rank w holds in its row `self.rank` (an all-to-all of equal blocks)."""
        if self.size == 1:
            return counts_WE
        received = torch.empty_like(counts_WE)
        dist.all_to_all_single(received, counts_WE.contiguous(), group=self.group)
        return received

    @overload
    def all_gather(self, x: Tensor) -> Tensor: ...

    @overload
    def all_gather(self, x: Tensor, async_op: Literal[True]) -> tuple[Tensor, dist.Work | None]: ...

    def all_gather(self, x: Tensor, async_op: bool = False) -> Tensor | tuple[Tensor, dist.Work | None]:
        """[...] of the same shape on every rank -> [W, ...], and if asynchronous the work to wait for."""
        if self.size == 1:
            return (x.unsqueeze(0), None) if async_op else x.unsqueeze(0)
        gathered = x.new_empty((self.size, *x.shape))
        target = gathered.view(-1, *x.shape[1:]) if x.dim() else gathered
        work = _all_gather(target, x.contiguous(), group=self.group, async_op=async_op)
        return (gathered, work) if async_op else gathered

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[W, ...] -> [...]: the sum over ranks of row `self.rank`."""
        if self.size == 1:
            return x.squeeze(0)
        reduced = x.new_empty(x.shape[1:])
        _reduce_scatter(reduced, x.contiguous().view(-1, *x.shape[2:]), group=self.group)
        return reduced

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor."""
        if self.size == 1:
            return x.clone()
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total


_ALONE = Communicator(None)
