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

from moeweave.comm.codec import Codec
from moeweave.comm.coded_rows import check_coded_rows, coded, coded_words
from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.layout import Layout, exchange_layout
from moeweave.comm.pending import Pending
from moeweave.comm.transfer import (
    backward_combine,
    backward_rows,
    combine_routes,
    from_words,
    place_routes,
    save_combine,
    save_moves,
    send_routes,
    sum_routes,
    to_words,
)


class AllToAllDispatcher:
    """TokenDispatcher over `torch.distributed.all_to_all_single`; combine is exact (a row a route, summed at home).

    Args:
        group: ranks that share the experts, None for this rank alone.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        codec: formats of the rows on the link.
        coded_rows: dispatch hands over codes and scales as they came, for a low-precision grouped product; no gradient.
    """

    def __init__(
        self, group: ProcessGroup | None, num_experts: int, *, codec: Codec | None = None, coded_rows: bool = False
    ) -> None:
        self.comm = Communicator(group)
        self.num_experts = num_experts
        self.codec, self.coded_rows = codec or Codec(), coded_rows
        check_coded_rows(self.codec, coded_rows)

    def layout(self, ids_TK: Tensor) -> Layout:
        order, sends, receives, perm, offsets = exchange_layout(ids_TK, self.num_experts, self.comm.name)
        num_tokens, top_k = ids_TK.shape
        return Layout(order, sends, receives, perm, offsets, num_tokens, top_k, self.comm.name)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        layout = handle or self.layout(ids_TK)
        route = (*layout.moves, None, layout.top_k, layout.group)
        if self.coded_rows:
            words = send_routes(coded_words(x_TD, self.codec), *route)
            return coded(words, self.codec, x_TD.shape[1], layout)
        return Dispatched(send_routes(x_TD, *route, *self.codec.for_dispatch), None, None, layout.offsets_e, layout)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        layout = dispatched.handle
        y_TD, _ = combine_routes(rows_RD, weights_TK, *layout.moves, layout.group, *self.codec.for_combine)
        return y_TD

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        layout = handle or self.layout(ids_TK)
        format, back, scale = self.codec.for_dispatch
        sends = layout.send_splits.tolist()
        words = coded_words(x_TD, self.codec) if self.coded_rows else to_words(x_TD.detach(), format, scale)
        words = words.index_select(0, layout.order_N[: sum(sends)] // layout.top_k)
        received, work = self.comm.all_to_all(words, sends, layout.recv_splits.tolist(), async_op=True)

        def finish() -> Dispatched:
            if work is not None:
                work.wait()
            arrived = received if self.comm.size == 1 else received.index_select(0, layout.perm_R)
            if self.coded_rows:
                return coded(arrived, self.codec, x_TD.shape[1], layout)
            rows_RD = from_words(arrived, format, scale, x_TD.shape[1], x_TD.dtype)
            return Dispatched(_Arrived.apply(x_TD, rows_RD, layout, back, scale), None, None, layout.offsets_e, layout)

        return Pending(finish)

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        layout = dispatched.handle
        format, back, scale = self.codec.for_combine
        words = to_words(rows_RD.detach()[: layout.perm_R.shape[0]], format, scale)
        if self.comm.size > 1:
            words = torch.empty_like(words).index_copy_(0, layout.perm_R, words)
        received, work = self.comm.all_to_all(
            words, layout.recv_splits.tolist(), layout.send_splits.tolist(), async_op=True
        )

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            returned = from_words(received, format, scale, rows_RD.shape[1], rows_RD.dtype)
            return _Returned.apply(rows_RD, weights_TK, returned, layout, back, scale)

        return Pending(finish)


class _Arrived(torch.autograd.Function):
    """Joins rows that an asynchronous dispatch brought to the graph of the tokens they came from."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_RD: Tensor, layout: Layout, back: str, scale: str) -> Tensor:
        sizes = dict(num_tokens=layout.num_tokens, top_k=layout.top_k)
        save_moves(ctx, layout.moves, **sizes, group=layout.group, format=back, scale=scale)
        return rows_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return backward_rows(ctx, grad_RD), None, None, None, None


class _Returned(torch.autograd.Function):
    """Weighted sum of the rows that an asynchronous combine brought back."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_TK: Tensor, returned: Tensor, layout: Layout, back: str, scale: str
    ) -> Tensor:
        routes = layout.order_N[: returned.shape[0]]
        routes_TKD = place_routes(returned, routes, layout.num_tokens, layout.top_k)
        save_combine(ctx, rows_RD, weights_TK, routes_TKD, layout.moves, (layout.group, back, scale))
        return sum_routes(routes_TKD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_combine(ctx, grad_TD), None, None, None, None
