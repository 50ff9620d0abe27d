"""Exchanges of rows in two halves, posted and joined, in both directions of the graph.

    dispatch    post   x_TD -> token               join   token -> rows_RD
      backward  join   sum of what came back   <-  post   grad_RD leaves
    combine     post   rows_RD -> token            join   token, weights_TK -> y_TD
      backward  join   grad_RD                 <-  post   weighted grad_TD leaves

The token is an empty tensor: it carries no data, only the edge of the graph between the halves. Whatever runs between
them in the forward pass has its counterpart between them in backward, so a schedule that hides an exchange hides its
gradient's exchange as well, without a second schedule.

Values are those of the operators in `transfer`, bit by bit.

Legend: T tokens here, K routes a token, R rows here, D width of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.codec import Codec
from moeweave.comm.communicator import Communicator
from moeweave.comm.layout import Layout
from moeweave.comm.pending import Pending
from moeweave.comm.transfer import (
    from_words,
    grad_of_weights,
    pad_rows,
    place_routes,
    save_moves,
    sum_routes,
    to_words,
    weighted_rows,
)


class Exchange:
    """Rows under way by all-to-all, in the format that they travel in."""

    def __init__(self, comm: Communicator, format: str, scale: str) -> None:
        self.comm, self.format, self.scale = comm, format, scale
        self._sent: tuple[Tensor, dist.Work | None, int, torch.dtype] | None = None

    def post(self, words: Tensor, sends: Tensor, receives: Tensor, like: Tensor) -> None:
        """Send `words`, rows in travelling form; `like` has the width and dtype that they are decoded to."""
        received, work = self.comm.all_to_all(words, sends.tolist(), receives.tolist(), async_op=True)
        self._sent = received, work, like.shape[1], like.dtype

    def post_tokens(self, x_TD: Tensor, layout: Layout) -> None:
        """Send each token to the ranks of its experts, a row a route."""
        words = to_words(x_TD, self.format, self.scale)
        routes = layout.order_N[: int(layout.send_splits.sum())]
        self.post(words.index_select(0, routes // layout.top_k), layout.send_splits, layout.recv_splits, x_TD)

    def join_rows(self, layout: Layout) -> Tensor:
        """Rows of tokens that arrived, by expert."""
        words, width, dtype = self.join()
        if self.comm.size > 1:
            words = words.index_select(0, layout.perm_R)
        return from_words(words, self.format, self.scale, width, dtype)

    def join(self) -> tuple[Tensor, int, torch.dtype]:
        """What arrived, in travelling form, and the width and dtype of its rows."""
        assert self._sent is not None, "an exchange is joined once, after it was posted"
        received, work, width, dtype = self._sent
        self._sent = None
        if work is not None:
            work.wait()
        return received, width, dtype


class Gather(Exchange):
    """Every token to every rank, instead of a row a route."""

    def post_tokens(self, x_TD: Tensor, layout: Layout) -> None:
        assert layout.max_tokens is not None, "layout of another dispatcher"
        words = to_words(x_TD, self.format, self.scale)
        padded = torch.nn.functional.pad(words, (0, 0, 0, int(layout.max_tokens) - x_TD.shape[0]))
        gathered, work = self.comm.all_gather(padded, async_op=True)
        self._sent = gathered.flatten(0, 1), work, x_TD.shape[1], x_TD.dtype

    def join_rows(self, layout: Layout) -> Tensor:
        assert layout.route_R is not None, "layout of another dispatcher"
        words, width, dtype = self.join()
        rows_ND = from_words(words, self.format, self.scale, width, dtype)
        return rows_ND.index_select(0, layout.route_R // layout.top_k)


class PostDispatch(torch.autograd.Function):
    """Sends tokens to the ranks of their experts. x_TD -> token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layout: Layout, there: Exchange, back: Exchange) -> Tensor:
        there.post_tokens(x_TD, layout)
        save_moves(ctx, layout.moves, num_tokens=layout.num_tokens, top_k=layout.top_k)
        ctx.back = back
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None]:
        back = ctx.back
        words, width, dtype = back.join()
        rows = from_words(words, back.format, back.scale, width, dtype)
        order_N, sends, _, _ = ctx.saved_tensors
        routes_TKD = place_routes(rows, order_N[: int(sends.sum())], **ctx.settings)
        return sum_routes(routes_TKD, None), None, None, None


class JoinDispatch(torch.autograd.Function):
    """Waits for the rows. token -> rows_RD by expert."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, layout: Layout, there: Exchange, back: Exchange) -> Tensor:
        save_moves(ctx, layout.moves)
        ctx.back = back
        return there.join_rows(layout)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        _, sends, receives, perm_R = ctx.saved_tensors
        back = ctx.back
        back.post(_in_arrival_order(grad_RD, perm_R, back), receives, sends, grad_RD)
        return grad_RD.new_empty(0), None, None, None


class PostCombine(torch.autograd.Function):
    """Sends the experts' results back. rows_RD -> token."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, layout: Layout, there: Exchange, back: Exchange) -> Tensor:
        save_moves(ctx, layout.moves)
        ctx.back, ctx.num_rows = back, rows_RD.shape[0]
        words = _in_arrival_order(rows_RD[: layout.perm_R.shape[0]], layout.perm_R, there)
        there.post(words, layout.recv_splits, layout.send_splits, rows_RD)
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None]:
        back = ctx.back
        words, width, dtype = back.join()
        if back.comm.size > 1:
            words = words.index_select(0, ctx.saved_tensors[3])
        rows = from_words(words, back.format, back.scale, width, dtype)
        return pad_rows(rows, ctx.num_rows), None, None, None


class JoinCombine(torch.autograd.Function):
    """Waits for the results and sums them. token, weights_TK -> y_TD."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weights_TK: Tensor, layout: Layout, there: Exchange, back: Exchange) -> Tensor:
        words, width, dtype = there.join()
        rows = from_words(words, there.format, there.scale, width, dtype)
        routes_TKD = place_routes(rows, layout.order_N[: rows.shape[0]], layout.num_tokens, layout.top_k)
        kept = [routes_TKD] if weights_TK.requires_grad else []
        ctx.back = back
        ctx.save_for_backward(weights_TK, *layout.moves, *kept)
        return sum_routes(routes_TKD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        weights_TK, order_N, sends, receives, _, *routes_TKD = ctx.saved_tensors
        back = ctx.back
        rows = weighted_rows(grad_TD, weights_TK.detach(), order_N[: int(sends.sum())])
        back.post(to_words(rows, back.format, back.scale), sends, receives, grad_TD)
        grad_weights = grad_of_weights(grad_TD, routes_TKD[0], weights_TK.dtype) if routes_TKD else None
        return grad_TD.new_empty(0), grad_weights, None, None, None


def _in_arrival_order(rows_RD: Tensor, perm_R: Tensor, exchange: Exchange) -> Tensor:
    words = to_words(rows_RD.detach(), exchange.format, exchange.scale)
    if exchange.comm.size == 1:
        return words
    return torch.empty_like(words, memory_format=torch.contiguous_format).index_copy_(0, perm_R, words)


def post_combine(
    comm: Communicator, codec: Codec, rows_RD: Tensor, weights_TK: Tensor, layout: Layout
) -> Pending[Tensor]:
    """The exact combine, posted: rows_RD -> pending y_TD."""
    format, back, scale = codec.for_combine
    ways = Exchange(comm, format, scale), Exchange(comm, back, scale)
    token = PostCombine.apply(rows_RD, layout, *ways)
    return Pending(lambda token: JoinCombine.apply(token, weights_TK, layout, *ways), token)
