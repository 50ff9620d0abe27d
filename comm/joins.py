"""Rows that came over two planes, joined to the graph of what they came from; gradients go back over both planes too.

    dispatch    post   x_TD -> token        rows leave, other work, rows come     join   token, rows -> rows_RD
      backward  join   sum of what came back       <-  other work's gradients  <- post   grad_RD leaves
    combine     post   rows_RD -> token     results leave, and come               join   token, weights_TK -> y_TD
      backward  join   grad_RD              <-  gradients of the weights_TK  <-   post   weighted grad_TD leaves

The token is an empty tensor, the edge of the graph between the halves. What the forward pass computes between them has
its gradients computed between them: autograd runs what is ready in the reverse order, so the shared expert's gradients
hide those of the rows.

Legend: T tokens here, K routes a token, D width, R rows here, N rows sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moeweave.comm.layout import Layout
from moeweave.comm.pending import Pending
from moeweave.comm.transfer import (
    from_words,
    grad_of_weights,
    pad_rows,
    place_routes,
    sum_routes,
    to_words,
    weighted_rows,
)
from moeweave.comm.transfer_gathered import grads_of_prereduced, save_prereduced
from moeweave.comm.two_planes import Planes


class GradientWay:
    """Gradients on their way back: posted by one node of the graph, joined by an earlier one.

    Args:
        planes: over which they go. name: of their spans. coding: format and scale of their rows.
        most: rows from a rank to another, as `Planes.all_to_all` has it.
    """

    def __init__(self, planes: Planes, name: str, coding: tuple[str, str], most: int) -> None:
        self.planes, self.name, self.coding, self.most = planes, name, coding, most
        self._under_way: Pending[Tensor] | None = None

    def post_rows(self, rows_ND: Tensor, sends: Tensor, receives: Tensor, then: Callable[[Tensor], Tensor]) -> None:
        """Rows by destination; `join` gives `then` of what comes."""
        splits = sends.tolist(), receives.tolist()
        self._post(lambda words: self.planes.all_to_all(self.name, words, *splits, self.most), rows_ND, then)

    def post_tokens(self, rows_TD: Tensor, most: int, then: Callable[[Tensor], Tensor]) -> None:
        """All rows to every rank, none of which has more than `most`."""

        def gather(words: Tensor) -> Pending[Tensor]:
            return self.planes.all_gather(self.name, pad(words, (0, 0, 0, most - words.shape[0])))

        self._post(gather, rows_TD, then)

    def _post(
        self, exchange: Callable[[Tensor], Pending[Tensor]], rows: Tensor, then: Callable[[Tensor], Tensor]
    ) -> None:
        (format, scale), width, dtype = self.coding, rows.shape[1], rows.dtype
        pending = exchange(to_words(rows, format, scale))
        self._under_way = Pending(lambda: then(from_words(pending.wait(), format, scale, width, dtype)))

    def join(self) -> Tensor:
        assert self._under_way is not None, "a gradient is joined once, after it was posted"
        pending, self._under_way = self._under_way, None
        return pending.wait()


class Post(torch.autograd.Function):
    """Rows that have left. rows -> token."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: GradientWay) -> Tensor:
        ctx.way, ctx.num_rows = way, rows.shape[0]
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return pad_rows(ctx.way.join(), ctx.num_rows), None


class JoinArrived(torch.autograd.Function):
    """Tokens' rows that have come, as they are. token, rows_RD -> rows_RD."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, rows_RD: Tensor, layout: Layout, way: GradientWay) -> Tensor:
        ctx.way, ctx.sizes = way, (layout.num_tokens, layout.top_k)
        ctx.save_for_backward(*layout.moves)
        # Detached: autograd takes what is handed through as it is for a view, which a model may not add to in place.
        return rows_RD.detach()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        order_N, sends, receives, perm_R = ctx.saved_tensors
        rows = grad_RD[: perm_R.shape[0]]
        arrival = torch.empty_like(rows, memory_format=torch.contiguous_format).index_copy_(0, perm_R, rows)
        routes, sizes = order_N[: int(sends.sum())], ctx.sizes
        ctx.way.post_rows(arrival, receives, sends, lambda came: sum_routes(place_routes(came, routes, *sizes), None))
        return grad_RD.new_empty(0), None, None, None


class JoinReturned(torch.autograd.Function):
    """Weighted sum of a token's results, a row a route. token, weights_TK -> y_TD."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, weights_TK: Tensor, returned: Tensor, layout: Layout, way: GradientWay
    ) -> Tensor:
        routes = layout.order_N[: returned.shape[0]]
        routes_TKD = place_routes(returned, routes, layout.num_tokens, layout.top_k)
        ctx.way = way
        ctx.save_for_backward(weights_TK, *layout.moves, *([routes_TKD] if weights_TK.requires_grad else []))
        return sum_routes(routes_TKD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        weights_TK, order_N, sends, receives, perm_R, *routes_TKD = ctx.saved_tensors
        rows = weighted_rows(grad_TD, weights_TK.detach(), order_N[: int(sends.sum())])
        ctx.way.post_rows(rows, sends, receives, lambda came: came.index_select(0, perm_R))
        grad_weights = grad_of_weights(grad_TD, routes_TKD[0], weights_TK.dtype) if routes_TKD else None
        return grad_TD.new_empty(0), grad_weights, None, None, None


class PostPrereduced(torch.autograd.Function):
    """Results that have left as sums; `weights_TK` takes the gradient. rows_RD, weights_TK -> token."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_TK: Tensor, weights_R: Tensor, layout: Layout, way: GradientWay
    ) -> Tensor:
        assert layout.route_R is not None and layout.max_tokens is not None
        others = (weights_R, layout.route_R, layout.max_tokens, *layout.moves)
        save_prereduced(ctx, rows_RD, weights_TK, others, (layout.group, *way.coding))
        ctx.way = way
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *grads_of_prereduced(ctx, ctx.saved_tensors, ctx.way.join()), None, None, None


class JoinPrereduced(torch.autograd.Function):
    """Sums that have come, as they are. token, summed_TD -> y_TD."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, summed_TD: Tensor, layout: Layout, way: GradientWay) -> Tensor:
        ctx.way, ctx.top_k = way, layout.top_k
        ctx.save_for_backward(layout.route_R, layout.max_tokens)
        return summed_TD.detach()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        route_R, most = ctx.saved_tensors
        source_R = route_R // ctx.top_k
        ctx.way.post_tokens(grad_TD, int(most), lambda came: came.index_select(0, source_R))
        return grad_TD.new_empty(0), None, None, None
