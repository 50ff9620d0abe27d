"""Rows that came by other means, joined to the graph of what they came from; gradients go back a row a route.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeweave.comm.layout import Layout
from moeweave.comm.transfer import backward_combine, backward_rows, place_routes, save_combine, save_moves, sum_routes
from moeweave.comm.transfer_gathered import backward_prereduced, save_prereduced


class JoinArrived(torch.autograd.Function):
    """Joins rows that arrived to the graph of the tokens that they came from."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_RD: Tensor, layout: Layout, gradient: tuple[str, str]) -> Tensor:
        format, scale = gradient
        sizes = dict(num_tokens=layout.num_tokens, top_k=layout.top_k)
        save_moves(ctx, layout.moves, **sizes, group=layout.group, format=format, scale=scale)
        # Detached: autograd takes what is handed through as it is for a view, which a model may not add to in place.
        return rows_RD.detach()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return backward_rows(ctx, grad_RD), None, None, None


class JoinReturned(torch.autograd.Function):
    """Weighted sum of a token's results, a row a route."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_TK: Tensor, returned: Tensor, layout: Layout, gradient: tuple[str, str]
    ) -> Tensor:
        routes = layout.order_N[: returned.shape[0]]
        routes_TKD = place_routes(returned, routes, layout.num_tokens, layout.top_k)
        save_combine(ctx, rows_RD, weights_TK, routes_TKD, layout.moves, (layout.group, *gradient))
        return sum_routes(routes_TKD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_combine(ctx, grad_TD), None, None, None


class JoinPrereduced(torch.autograd.Function):
    """Sums that arrived, joined to the graph of the rows that they are sums of."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_TK: Tensor,
        summed_TD: Tensor,
        weights_R: Tensor,
        layout: Layout,
        gradient: tuple[str, str],
    ) -> Tensor:
        assert layout.route_R is not None and layout.max_tokens is not None
        others = (weights_R, layout.route_R, layout.max_tokens, *layout.moves)
        save_prereduced(ctx, rows_RD, weights_TK, others, (layout.group, *gradient))
        return summed_TD.detach()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_prereduced(ctx, grad_TD), None, None, None, None
