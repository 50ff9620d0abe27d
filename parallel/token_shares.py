"""Who routes which tokens when several ranks hold the same ones (tensor parallelism).

Worked example, 5 tokens on 2 tp ranks: rank 0 routes tokens 0, 1, 2 and rank 1 tokens 3, 4; both get all 5 outputs.

Legend: T tokens that every tp rank holds, t of them this rank's share, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moeweave.comm.communicator import Communicator


class TokenShares:
    """Each tp rank's share of tokens that all of them hold: rows [rank * t, (rank + 1) * t), t = ceil(T / tp), the last
    ranks' shorter or empty. Gradients of shares and of gathered tokens are whole on every rank."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.comm = Communicator(mesh.get_group())
        self.size, self.rank = self.comm.size, self.comm.rank

    def bounds(self, num_tokens: int) -> tuple[int, int]:
        step = -(-num_tokens // self.size)
        return min(self.rank * step, num_tokens), min((self.rank + 1) * step, num_tokens)

    def take(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [t, D]; the gradient is gathered."""
        return _Take.apply(x_TD, self)

    def join(self, x_tD: Tensor, num_tokens: int) -> Tensor:
        """[t, D] -> [T, D], T = `num_tokens`; the gradient, which every rank has whole, is cut."""
        return _Join.apply(x_tD, num_tokens, self)

    def gather(self, x_tD: Tensor, num_tokens: int) -> Tensor:
        """`join`, without a gradient."""
        step = -(-num_tokens // self.size)
        padded_tD = nn.functional.pad(x_tD, (0, 0, 0, step - x_tD.shape[0]))
        return self.comm.all_gather(padded_tD).flatten(0, 1)[:num_tokens]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, shares: TokenShares) -> Tensor:
        ctx.shares, ctx.num_tokens = shares, x_TD.shape[0]
        start, end = shares.bounds(x_TD.shape[0])
        return x_TD[start:end].clone()

    @staticmethod
    def backward(ctx: Any, grad_tD: Tensor) -> tuple[Tensor, None]:
        return ctx.shares.gather(grad_tD, ctx.num_tokens), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, num_tokens: int, shares: TokenShares) -> Tensor:
        ctx.bounds = shares.bounds(num_tokens)
        return shares.gather(x_tD, num_tokens)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        start, end = ctx.bounds
        return grad_TD[start:end].contiguous(), None, None
