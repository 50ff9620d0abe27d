"""Which positions of a sequence each rank of a group holds, and the four ways between shards and the whole.

    contiguous  rank r holds positions [r * step, (r + 1) * step), step = ceil(S / W)
    zigzag      of 2 W equal chunks rank r holds the r-th from either end, which evens out causal attention

Worked example, 5 positions on 2 ranks: contiguous [0 1 2] and [3 4]; zigzag, chunks of 2: [0 1] and [2 3 4].

Shards at the end are shorter, or empty: no position is padded, so no token is routed or counted that is not there.

Legend: W ranks, S positions of the whole sequence, s of a shard.
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

    @property
    def chunk(self) -> int:
        """Positions of a chunk that is not cut short by the end."""
        return -(-self.length // (self.comm.size * (2 if self.zigzag else 1)))

    @property
    def step(self) -> int:
        """Positions of a shard that is not cut short by the end."""
        return self.chunk * (2 if self.zigzag else 1)

    def spans_of(self, rank: int) -> list[tuple[int, int]]:
        """Half-open intervals of the positions that `rank` holds, in order."""
        chunks = (rank, 2 * self.comm.size - 1 - rank) if self.zigzag else (rank,)
        return [(min(i * self.chunk, self.length), min((i + 1) * self.chunk, self.length)) for i in chunks]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return self.spans_of(self.comm.rank)

    @property
    def held(self) -> int:
        """s: how many positions this rank holds."""
        return sum(stop - start for start, stop in self.spans)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Whole -> this rank's shard. Autograd's own gradient: zeros where other ranks' positions are."""
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.spans], dim)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Shards -> whole, without a gradient."""
        dim %= x.dim()
        shards = self.comm.all_gather(pad(x, dim, self.step))
        pieces = []
        for rank in range(self.comm.size):
            offset = 0
            for start, stop in self.spans_of(rank):
                pieces.append((start, shards[rank].narrow(dim, offset, stop - start)))
                offset += stop - start
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda each: each[0])], dim)

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Whole on every rank -> this rank's shard of the sum over ranks, without a gradient."""
        dim %= x.dim()
        parts = [
            torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.spans_of(rank)], dim)
            for rank in range(self.comm.size)
        ]
        summed = self.comm.reduce_scatter(torch.stack([pad(part, dim, self.step) for part in parts]))
        return summed.narrow(dim, 0, self.held)


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
