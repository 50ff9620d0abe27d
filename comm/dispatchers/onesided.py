"""Dispatch by one-sided writes: each token once to each rank that needs it, straight into that rank's window.

Wins over collectives where memory can be shared, whatever the routing: no exchange of counts, no staging on either
side, and fewer rows than an all-to-all (2.7 for 6.0 at top-8 over 4 ranks). On the CPU all ranks must be on one host.
The way back is one row a token and rank, summed on the experts' rank ("prereduced", the default: bitwise repeatable,
rounded once more), or a row a route ("exact": the bits of the all-to-all dispatcher).

The asynchronous forms write at once and read at `wait`. `dispatch_async` of several micro-batches may be under way.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.coded_rows import check_coded_rows, coded, coded_words
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.engines import engine_named, engine_of
from moeweave.comm.exchange_onesided import JoinDispatch, JoinRows, JoinSums, PostDispatch, PostRows, PostSums, UnderWay
from moeweave.comm.layout import Layout
from moeweave.comm.onesided import Engine, Moves
from moeweave.comm.onesided_combine import onesided_combine_rows, onesided_combine_sums
from moeweave.comm.onesided_nodes import NodeMoves
from moeweave.comm.onesided_ops import Settings, onesided_dispatch, onesided_resend
from moeweave.comm.onesided_parts import PartMoves
from moeweave.comm.pending import Pending

AnyMoves = Moves | NodeMoves | PartMoves


class OneSidedDispatcher:
    """TokenDispatcher over symmetric windows.

    Args:
        group: ranks that share the experts, None for this rank alone. Making a dispatcher is a collective over it.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        combine: "prereduced" or "exact".
        codec: formats of the rows on the link.
        coded_rows: dispatch hands over codes and scales as they came, for a low-precision grouped product; no gradient.
        max_tokens: tokens that a rank may have at most; windows are sized for them once. None: windows grow.
        engine: another than the group's own, and its name.

    Raises:
        RuntimeError: ranks on several hosts; in any call, a peer that died, is late, or calls something else.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        num_experts: int,
        combine: str = "prereduced",
        *,
        codec: Codec | None = None,
        coded_rows: bool = False,
        max_tokens: int | None = None,
        engine: tuple[str, Engine] | None = None,
    ) -> None:
        self.codec, self.coded_rows = codec or Codec(), coded_rows
        check_coded_rows(self.codec, coded_rows)
        name, made = engine or engine_of(group)
        self.num_experts, self._moves = num_experts, made.moves
        # The engine of a group ends with the group; that of a rank alone, with its dispatcher.
        self._alone = made if group is None else None
        exact, room = combine == "exact", max_tokens or 0
        self._dispatch = Settings(name, exact, room, *self.codec.for_dispatch)
        self._combine = Settings(name, exact, room, *self.codec.for_combine)
        if coded_rows:  # the codes themselves are the rows
            self._dispatch = self._dispatch.uncoded
        self._dispatch_text, self._combine_text = self._dispatch.text, self._combine.text

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        sent, weights_TK = self._rows_to_send(x_TD), weights_TK.detach()
        if handle is None:
            rows_RD, weights_R, offsets_e, moves = onesided_dispatch(
                sent, ids_TK, weights_TK, self.num_experts, self._dispatch_text
            )
            handle = self._layout(ids_TK, offsets_e, self._moves(moves))
        else:
            rows_RD, weights_R = onesided_resend(sent, weights_TK, moves_of(handle).tensors, self._dispatch_text)
        return self._dispatched(rows_RD, weights_R, handle, x_TD.shape[1])

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        moves = moves_of(dispatched.handle).tensors
        if self._combine.exact:
            return onesided_combine_rows(rows_RD, weights_TK, moves, self._combine_text)[0]
        return onesided_combine_sums(rows_RD, weights_TK, _weights_of(dispatched), moves, self._combine_text)

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        engine, wire, sent = engine_named(self._dispatch.engine), self._dispatch.wire, self._rows_to_send(x_TD)
        if handle is not None:
            posted: Pending[Any] = engine.resend(sent, weights_TK, moves_of(handle), wire)
        else:
            posted = engine.dispatch(sent, ids_TK, weights_TK, self.num_experts, wire)
        way = UnderWay(posted, ids_TK.shape[1], self._dispatch)

        def finish(token: Tensor | None = None) -> Dispatched:
            rows_RD, weights_R, *new = way.join_there()
            layout = self._layout(ids_TK, *new) if handle is None else handle
            if token is not None:
                rows_RD = JoinDispatch.apply(token, rows_RD, way, x_TD.shape[0], moves_of(layout))
            return self._dispatched(rows_RD, weights_R, layout, x_TD.shape[1])

        return Pending(finish, None if self.coded_rows else PostDispatch.apply(x_TD, way))

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        engine, wire, moves = engine_named(self._combine.engine), self._combine.wire, moves_of(dispatched.handle)
        num_tokens, top_k = weights_TK.shape
        if self._combine.exact:
            rows = engine.return_rows(rows_RD.detach(), moves, num_tokens, top_k, wire)
            way = UnderWay(rows, top_k, self._combine)
            token = PostRows.apply(rows_RD, way)
            return Pending(lambda token: JoinRows.apply(token, weights_TK, way, moves), token)
        weights_R = _weights_of(dispatched)
        sums = engine.return_sums(rows_RD.detach(), weights_R, moves, num_tokens, top_k, wire)
        way = UnderWay(sums, top_k, self._combine)
        token = PostSums.apply(rows_RD, weights_TK, weights_R, way, moves)
        return Pending(lambda token: JoinSums.apply(token, weights_TK.detach(), way, moves), token)

    def close(self) -> None:
        """Leave the group's windows: no dispatcher over the group can be used afterwards. Its end does the same."""
        engine_named(self._dispatch.engine).close()

    def _rows_to_send(self, x_TD: Tensor) -> Tensor:
        return coded_words(x_TD, self.codec) if self.coded_rows else x_TD

    def _dispatched(self, rows_RD: Tensor, weights_R: Tensor, layout: Layout, width: int) -> Dispatched:
        weights = None if self._combine.exact else weights_R
        if self.coded_rows:
            return coded(rows_RD, self.codec, width, layout, weights)
        return Dispatched(rows_RD, None, weights, layout.offsets_e, layout)

    def _layout(self, ids_TK: Tensor, offsets_e: Tensor, moves: AnyMoves) -> Layout:
        inside = moves if isinstance(moves, Moves) else moves.inside
        order_N, sent, received, perm_R = inside.order_N, inside.splits[0], inside.splits[1], inside.perm_R
        (num_tokens, top_k), engine = ids_TK.shape, self._dispatch.engine
        return Layout(order_N, sent, received, perm_R, offsets_e, num_tokens, top_k, engine, slots=moves)


def moves_of(layout: Layout) -> AnyMoves:
    """The one-sided part of a layout."""
    assert isinstance(layout.slots, Moves | NodeMoves | PartMoves), "layout of another dispatcher"
    return layout.slots


def _weights_of(dispatched: Dispatched) -> Tensor:
    assert dispatched.weights_R is not None, "dispatched by another dispatcher"
    return dispatched.weights_R
