"""Dispatch by all-gather: every token to every rank of the group.

Wins when a token needs most of the group's ranks anyway (top-k at or above the group's size) and at few tokens, where
one collective of known size beats an exchange of counts. The way back is a row a route ("exact", the default: the same
bits as the all-to-all dispatcher), or one row a token and rank, summed by a reduce-scatter ("prereduced": fewer bytes,
rounded once more; in a coded format by an all-to-all of partial sums, since no collective adds codes).

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.coded_rows import check_coded_rows, coded, coded_words
from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.exchange import Exchange, Gather, JoinDispatch, PostDispatch, post_combine
from moeweave.comm.layout import Layout, gather_layout
from moeweave.comm.pending import Pending
from moeweave.comm.transfer import combine_routes, send_routes
from moeweave.comm.transfer_gathered import combine_prereduced, gather_rows


class AllGatherDispatcher:
    """TokenDispatcher over `torch.distributed.all_gather_into_tensor`.

    Args:
        group: ranks that share the experts, None for this rank alone.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        combine: "exact" or "prereduced".
        codec: formats of the rows on the link.
        return_group: a group of the same ranks for what is combined asynchronously, None: `group` does both.
        coded_rows: dispatch hands over codes and scales as they came, for a low-precision grouped product; no gradient.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        num_experts: int,
        combine: str = "exact",
        *,
        return_group: ProcessGroup | None = None,
        codec: Codec | None = None,
        coded_rows: bool = False,
    ) -> None:
        self.comm = Communicator(group)
        self.return_comm = Communicator(return_group or group)
        self.num_experts = num_experts
        self.prereduced = combine == "prereduced"
        self.codec, self.coded_rows = codec or Codec(), coded_rows
        check_coded_rows(self.codec, coded_rows)

    def layout(self, ids_TK: Tensor) -> Layout:
        order, sends, receives, perm, offsets, route_R, max_tokens = gather_layout(
            ids_TK, self.num_experts, self.comm.name
        )
        num_tokens, top_k = ids_TK.shape
        return Layout(order, sends, receives, perm, offsets, num_tokens, top_k, self.comm.name, route_R, max_tokens)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        layout = handle or self.layout(ids_TK)
        weights_R = self._weights_of_rows(weights_TK.detach(), layout) if self.prereduced else None
        route = (*_gathered(layout), *layout.moves, layout.top_k, layout.group)
        if self.coded_rows:
            words = gather_rows(coded_words(x_TD, self.codec), *route)
            return coded(words, self.codec, x_TD.shape[1], layout, weights_R)
        rows_RD = gather_rows(x_TD, *route, *self.codec.for_dispatch)
        return Dispatched(rows_RD, None, weights_R, layout.offsets_e, layout)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        layout = dispatched.handle
        settings = (*layout.moves, layout.group, *self.codec.for_combine)
        if not self.prereduced:
            return combine_routes(rows_RD, weights_TK, *settings)[0]
        weights_R = dispatched.weights_R
        assert weights_R is not None, "dispatched by another dispatcher"
        return combine_prereduced(rows_RD, weights_TK, weights_R, *_gathered(layout), *settings)

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        if self.coded_rows or self.prereduced:
            return Pending.ready(self.dispatch(x_TD, ids_TK, weights_TK, handle=handle))
        layout = handle or self.layout(ids_TK)
        format, back, scale = self.codec.for_dispatch
        ways = Gather(self.comm, format, scale), Exchange(self.comm, back, scale)
        token = PostDispatch.apply(x_TD, layout, *ways)

        def finish(token: Tensor) -> Dispatched:
            return Dispatched(JoinDispatch.apply(token, layout, *ways), None, None, layout.offsets_e, layout)

        return Pending(finish, token)

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        if self.prereduced:
            return Pending.ready(self.combine(rows_RD, weights_TK, dispatched))
        return post_combine(self.return_comm, self.codec, rows_RD, weights_TK, dispatched.handle)

    def _weights_of_rows(self, weights_TK: Tensor, layout: Layout) -> Tensor:
        """Weights [T, K] -> the weight of each row on its expert's rank [R]: routes sent as rows of width one."""
        return send_routes(weights_TK.reshape(-1, 1), *layout.moves, None, 1, layout.group).squeeze(1)


def _gathered(layout: Layout) -> tuple[Tensor, Tensor]:
    assert layout.route_R is not None and layout.max_tokens is not None, "layout of another dispatcher"
    return layout.route_R, layout.max_tokens
