"""Dispatch by all-to-all: a row a route, to the rank of its expert and back.

Wins when a token needs few of the group's ranks (top-k below the group's size): only routed rows travel. Costs an
exchange of counts before every dispatch, and one host synchronisation. On a group of one rank it is a local permute.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.coded_rows import check_coded_rows, coded, coded_words
from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.exchange import Exchange, JoinDispatch, PostDispatch, post_combine
from moeweave.comm.layout import Layout, exchange_layout
from moeweave.comm.pending import Pending
from moeweave.comm.transfer import combine_routes, send_routes


class AllToAllDispatcher:
    """TokenDispatcher over `torch.distributed.all_to_all_single`; combine is exact (a row a route, summed at home).

    Args:
        group: ranks that share the experts, None for this rank alone.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        codec: formats of the rows on the link.
        return_group: a group of the same ranks for asynchronous combines, so that they never wait behind a dispatch;
            None: `group` does both.
        coded_rows: dispatch hands over codes and scales as they came, for a low-precision grouped product; no gradient.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        num_experts: int,
        *,
        return_group: ProcessGroup | None = None,
        codec: Codec | None = None,
        coded_rows: bool = False,
    ) -> None:
        self.comm = Communicator(group)
        self.return_comm = Communicator(return_group or group)
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
        if self.coded_rows:
            return self._post_coded(x_TD, layout)
        ways = Exchange(self.comm, format, scale), Exchange(self.comm, back, scale)
        token = PostDispatch.apply(x_TD, layout, *ways)

        def finish(token: Tensor) -> Dispatched:
            return Dispatched(JoinDispatch.apply(token, layout, *ways), None, None, layout.offsets_e, layout)

        return Pending(finish, token)

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        return post_combine(self.return_comm, self.codec, rows_RD, weights_TK, dispatched.handle)

    def _post_coded(self, x_TD: Tensor, layout: Layout) -> Pending[Dispatched]:
        words = coded_words(x_TD, self.codec)
        sends, receives = layout.send_splits.tolist(), layout.recv_splits.tolist()
        words = words.index_select(0, layout.order_N[: sum(sends)] // layout.top_k)
        received, work = self.comm.all_to_all(words, sends, receives, async_op=True)

        def finish() -> Dispatched:
            if work is not None:
                work.wait()
            arrived = received if self.comm.size == 1 else received.index_select(0, layout.perm_R)
            return coded(arrived, self.codec, x_TD.shape[1], layout)

        return Pending(finish)
