"""Dispatch by all-to-all: a row a route, to the rank of its expert and back.

Wins when a token needs few of the group's ranks (top-k below the group's size): only routed rows travel. Costs an
exchange of counts before every dispatch, and one host synchronisation. On a group of one rank it is a local permute.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.layout import Layout, exchange_layout
from moeweave.comm.pending import Pending
from moeweave.comm.transfer import (
    backward_combine,
    backward_rows,
    combine_routes,
    place_routes,
    save_combine,
    save_moves,
    send_routes,
    sum_routes,
)


class AllToAllDispatcher:
    """TokenDispatcher over `torch.distributed.all_to_all_single`; combine is exact (a row a route, summed at home).

    Args:
        group: ranks that share the experts, None for this rank alone.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
    """

    def __init__(self, group: ProcessGroup | None, num_experts: int) -> None:
        self.comm = Communicator(group)
        self.num_experts = num_experts

    def layout(self, ids_TK: Tensor) -> Layout:
        order, sends, receives, perm, offsets = exchange_layout(ids_TK, self.num_experts, self.comm.name)
        num_tokens, top_k = ids_TK.shape
        return Layout(order, sends, receives, perm, offsets, num_tokens, top_k, self.comm.name)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        layout = handle or self.layout(ids_TK)
        rows_RD = send_routes(x_TD, *layout.moves, None, layout.top_k, layout.group)
        return Dispatched(rows_RD, None, None, layout.offsets_e, layout)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        y_TD, _ = combine_routes(rows_RD, weights_TK, *dispatched.handle.moves, dispatched.handle.group)
        return y_TD

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        layout = handle or self.layout(ids_TK)
        sends = layout.send_splits.tolist()
        with torch.no_grad():
            rows = x_TD.index_select(0, layout.order_N[: sum(sends)] // layout.top_k)
            received, work = self.comm.all_to_all(rows, sends, layout.recv_splits.tolist(), async_op=True)

        def finish() -> Dispatched:
            if work is not None:
                work.wait()
            arrived = received if self.comm.size == 1 else received.index_select(0, layout.perm_R)
            return Dispatched(_Arrived.apply(x_TD, arrived, layout), None, None, layout.offsets_e, layout)

        return Pending(finish)

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        layout = dispatched.handle
        with torch.no_grad():
            rows = rows_RD[: layout.perm_R.shape[0]]
            if self.comm.size > 1:
                rows = torch.empty_like(rows).index_copy_(0, layout.perm_R, rows)
            received, work = self.comm.all_to_all(
                rows, layout.recv_splits.tolist(), layout.send_splits.tolist(), async_op=True
            )

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return _Returned.apply(rows_RD, weights_TK, received, layout)

        return Pending(finish)


class _Arrived(torch.autograd.Function):
    """Joins rows that an asynchronous dispatch brought to the graph of the tokens they came from."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_RD: Tensor, layout: Layout) -> Tensor:
        save_moves(ctx, layout.moves, num_tokens=layout.num_tokens, top_k=layout.top_k, group=layout.group)
        return rows_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return backward_rows(ctx, grad_RD), None, None


class _Returned(torch.autograd.Function):
    """Weighted sum of the rows that an asynchronous combine brought back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, returned: Tensor, layout: Layout) -> Tensor:
        routes = layout.order_N[: returned.shape[0]]
        routes_TKD = place_routes(returned, routes, layout.num_tokens, layout.top_k)
        save_combine(ctx, rows_RD, weights_TK, routes_TKD, layout.moves, layout.group)
        return sum_routes(routes_TKD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return *backward_combine(ctx, grad_TD), None, None
