"""One-sided exchanges in two halves, posted and joined, in both directions of the graph (see `exchange`).

    dispatch    post   x_TD -> token                          join   token -> rows_RD
      backward  join   return_sums, or return_rows summed  <-  post   of grad_RD, without weights
    combine     post   return_sums, or return_rows            join   token -> y_TD
      backward  join   grad_RD, times the weights          <-  post   resend of grad_TD

The weights' gradient of a prereduced combine is made where the rows are, and goes back when grad_RD is joined. Values
are those of the operators in `onesided_ops` and `onesided_combine`, bit by bit.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeweave.comm.engines import engine_named
from moeweave.comm.onesided_combine import grads_of_sums, save_sums, weighted_grad
from moeweave.comm.onesided_ops import Settings
from moeweave.comm.pending import Pending
from moeweave.comm.transfer import grad_of_weights, sum_routes


@dataclass
class UnderWay:
    """One exchange.

    Attributes:
        there: posted by the forward pass. back: posted by the backward pass.
        top_k: routes a token.
        settings: of the operators that do the same in one piece.
    """

    there: Pending[Any] | None
    top_k: int
    settings: Settings
    back: Pending[Any] | None = None

    # What was joined is not kept: a result that knows its node, kept by that node, would never be freed.

    def join_there(self) -> Any:
        assert self.there is not None, "an exchange is joined once"
        pending, self.there = self.there, None
        return pending.wait()

    def join_back(self) -> Any:
        assert self.back is not None, "a gradient is joined once, after it was posted"
        pending, self.back = self.back, None
        return pending.wait()


class PostDispatch(torch.autograd.Function):
    """Tokens that have left. x_TD -> token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, way: UnderWay) -> Tensor:
        ctx.way = way
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        found = ctx.way.join_back()
        return sum_routes(found, None) if ctx.way.settings.exact else found, None


class JoinDispatch(torch.autograd.Function):
    """Rows that have come, as they are. token, rows_RD -> rows_RD."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, rows_RD: Tensor, way: UnderWay, num_tokens: int, moves: Any) -> Tensor:
        ctx.way, ctx.num_tokens = way, num_tokens
        ctx.save_for_backward(*moves.tensors)
        # Detached: autograd takes what is handed through as it is for a view, which a model may not add to in place.
        return rows_RD.detach()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        way, settings = ctx.way, ctx.way.settings.backward
        engine = engine_named(settings.engine)
        where = engine.moves(list(ctx.saved_tensors)), ctx.num_tokens, way.top_k, settings.wire
        post_rows, post_sums = engine.return_rows, engine.return_sums
        way.back = post_rows(grad_RD, *where) if settings.exact else post_sums(grad_RD, None, *where)
        return grad_RD.new_empty(0), None, None, None, None


class PostRows(torch.autograd.Function):
    """Results that have left, a row a route. rows_RD -> token."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, way: UnderWay) -> Tensor:
        ctx.way, ctx.num_rows = way, rows_RD.shape[0]
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        grad_RD, weights_R = ctx.way.join_back()
        return weighted_grad(grad_RD, weights_R, ctx.num_rows), None


class JoinRows(torch.autograd.Function):
    """Their weighted sums. token, weights_TK -> y_TD."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weights_TK: Tensor, way: UnderWay, moves: Any) -> Tensor:
        routes_TKD = way.join_there()
        kept = [routes_TKD] if weights_TK.requires_grad else []
        ctx.way, ctx.num_moves = way, len(moves.tensors)
        ctx.save_for_backward(weights_TK, *moves.tensors, *kept)
        return sum_routes(routes_TKD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        weights_TK, *rest = ctx.saved_tensors
        _post_back(ctx.way, grad_TD, weights_TK, rest[: ctx.num_moves])
        returned = rest[ctx.num_moves :]
        grad_weights = grad_of_weights(grad_TD, returned[0], weights_TK.dtype) if returned else None
        return grad_TD.new_empty(0), grad_weights, None, None


class PostSums(torch.autograd.Function):
    """Results that have left, summed by token and rank. rows_RD, weights_TK -> token."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, weights_R: Tensor, way: UnderWay, moves: Any) -> Tensor:
        ctx.way = way
        save_sums(ctx, rows_RD, weights_TK, weights_R, moves.tensors, way.settings)
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD, _weights_R = ctx.way.join_back()
        return *grads_of_sums(ctx.saved_tensors, ctx.settings, grad_RD), None, None, None


class JoinSums(torch.autograd.Function):
    """Their sums over ranks. token -> y_TD."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weights_TK: Tensor, way: UnderWay, moves: Any) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(weights_TK, *moves.tensors)
        return way.join_there()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        weights_TK, *moves = ctx.saved_tensors
        _post_back(ctx.way, grad_TD, weights_TK, moves)
        return grad_TD.new_empty(0), None, None, None


def _post_back(way: UnderWay, grad_TD: Tensor, weights_TK: Tensor, moves: list[Tensor]) -> None:
    """Send the tokens' gradients to where their rows are."""
    settings = way.settings.backward
    engine = engine_named(settings.engine)
    way.back = engine.resend(grad_TD, weights_TK.detach(), engine.moves(moves), settings.wire)
