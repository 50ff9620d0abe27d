"""Which positions of a sequence each rank of a group holds, and the four ways between shards and the whole.

    contiguous  the positions are cut into W chunks, and rank r holds the r-th
    zigzag      into 2 W chunks, and rank r holds the r-th from either end, which evens out causal attention

Chunk i of n begins at position i * S // n: chunks differ by one position at most, and none is padded, so that no token
is routed or counted that is not there.

Worked example, 9 positions on 2 ranks: contiguous [0 1 2 3] and [4 5 6 7 8]; zigzag [0 1 6 7 8] and [2 3 4 5].

Legend: W ranks, S positions of the whole sequence, s of a shard, c of the longest shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.comm.communicator import Communicator


@dataclass(frozen=True)
class Shards:
    """How `length` positions are shared out over the ranks of `comm`."""

    length: int
    comm: Communicator
    zigzag: bool = False

    def spans_of(self, rank: int) -> list[tuple[int, int]]:
        """Half-open intervals of the positions that `rank` holds, in order."""
        size = self.comm.size
        number = 2 * size if self.zigzag else size
        chunks = (rank, number - 1 - rank) if self.zigzag else (rank,)
        return [(i * self.length // number, (i + 1) * self.length // number) for i in chunks]

    def held_by(self, rank: int) -> int:
        """s: how many positions `rank` holds."""
        return sum(stop - start for start, stop in self.spans_of(rank))

    @property
    def spans(self) -> list[tuple[int, int]]:
        return self.spans_of(self.comm.rank)

    @property
    def held(self) -> int:
        return self.held_by(self.comm.rank)

    @property
    def step(self) -> int:
        """c: positions of the longest shard."""
        return max(self.held_by(rank) for rank in range(self.comm.size))

    @property
    def least(self) -> int:
        """Positions of the shortest shard."""
        return min(self.held_by(rank) for rank in range(self.comm.size))

    def take(self, x: Tensor, dim: int, rank: int | None = None) -> Tensor:
        """Whole -> a rank's shard, by default this one's. Autograd's gradient: zeros at other ranks' positions."""
        spans = self.spans if rank is None else self.spans_of(rank)
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in spans], dim)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """[..., S, ...] -> [W, ..., c, ...]: every rank's shard, with zeros behind it."""
        return torch.stack([pad(self.take(x, dim, rank), dim, self.step) for rank in range(self.comm.size)])

    def merge(self, shards: Tensor, dim: int) -> Tensor:
        """[W, ..., c, ...] -> [..., S, ...], the reverse; `dim` counts without W."""
        pieces = []
        for rank in range(self.comm.size):
            offset = 0
            for start, stop in self.spans_of(rank):
                pieces.append((start, shards[rank].narrow(dim, offset, stop - start)))
                offset += stop - start
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda each: each[0])], dim)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Shards -> whole, without a gradient."""
        return self.merge(self.comm.all_gather(pad(x, dim, self.step)), dim)

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Whole on every rank -> this rank's shard of the sum over ranks, without a gradient."""
        return self.comm.reduce_scatter(self.split(x, dim)).narrow(dim, 0, self.held)


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with zeros behind it in `dim` (from the front) up to `size`."""
    missing = size - x.shape[dim]
    return x if missing == 0 else nn.functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))


def take_whole(x: Tensor, shards: Shards, dim: int) -> Tensor:
    """Whole -> shard, for a whole whose gradient every rank needs whole: it is gathered."""
    return _Take.apply(x, shards, dim)


def join(x: Tensor, shards: Shards, dim: int, factor: float = 1.0) -> Tensor:
    """Shards -> whole, for a gradient that every rank has whole: it is cut, and multiplied by `factor`."""
    return _Join.apply(x, shards, dim, factor)


def gather(x: Tensor, shards: Shards, dim: int) -> Tensor:
    """Shards -> whole, for a gradient of which every rank has a part: the parts are summed and cut."""
    return _Gather.apply(x, shards, dim)


def scatter(x: Tensor, shards: Shards, dim: int) -> Tensor:
    """Parts of a sum on every rank -> a shard of the sum; its gradient is gathered."""
    return _Scatter.apply(x, shards, dim)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int) -> Tensor:
        ctx.shards, ctx.dim = shards, dim
        return shards.take(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shards.gather(grad, ctx.dim), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int, factor: float) -> Tensor:
        ctx.shards, ctx.dim, ctx.factor = shards, dim, factor
        return shards.gather(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.shards.take(grad, ctx.dim) * ctx.factor, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int) -> Tensor:
        ctx.shards, ctx.dim = shards, dim
        return shards.gather(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shards.sum(grad, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int) -> Tensor:
        ctx.shards, ctx.dim = shards, dim
        return shards.sum(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shards.gather(grad, ctx.dim), None, None
