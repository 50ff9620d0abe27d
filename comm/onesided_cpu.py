"""One-sided exchange on the CPU: the four operations of `onesided.Engine` as rounds over shared memory.

    dispatch        each row once to each rank that needs it, with routes and weights; expanded there by expert
    resend          the same along a known layout: rows and weights alone
    return_sums     the expert's rank sums a token's rows there, the token's rank sums over ranks
    return_rows     every row back to its route

Rows are copied as words (`word_dtype`), whatever their dtype; each is written once into the window and read once from
it.

Legend: T tokens here, K routes a token, D width, B bytes of a row on the link, W ranks, R rows here, N routes sent, S
slots sent, e experts of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeweave.comm.codec import decode_rows, encode_rows
from moeweave.comm.layout import arrival_to_expert_major
from moeweave.comm.onesided import Arrived, Moves, Splits, Wire
from moeweave.comm.pending import Pending
from moeweave.comm.rounds import Call, Exchange, Place
from moeweave.comm.slots import list_slots, list_sums, plan_slots, prefix_sums
from moeweave.comm.transfer import place_routes, wide
from moeweave.comm.windows import HEADER, DispatchMap, ReturnMap, Sizes, word_dtype
from moeweave.kernels_ext.sum_rows import sum_rows

DISPATCH, RESEND, SUMS, ROWS = range(4)


class _Outgoing(NamedTuple):
    """Rows and weights that a rank sends, by destination."""

    words_TB: Tensor
    token_S: Tensor
    weights_N: Tensor
    slots_W: list[int]
    routes_W: list[int]

    def write(self, peer: int, place: Place) -> None:
        first, last = _bounds(self.slots_W, peer)
        start = place.source * place.map.tokens
        rows = place.map.rows(place.area, self.words_TB.dtype)[start : start + last - first]
        torch.index_select(self.words_TB, 0, self.token_S[first:last], out=rows)
        first, last = _bounds(self.routes_W, peer)
        place.map.weights(place.area)[place.source, : last - first].copy_(self.weights_N[first:last])


class CpuEngine:
    """`onesided.Engine` over an `Exchange`."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.size = exchange.peers.size

    def close(self) -> None:
        self.exchange.close()

    @torch.no_grad()
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, wire: Wire
    ) -> Pending[Arrived]:
        if x_TD.device.type != "cpu":
            raise ValueError(
                f"x.device ({x_TD.device}) must be cpu for dispatcher='onesided'. Use dispatcher='alltoall'."
            )
        size, (num_tokens, top_k), width = self.size, ids_TK.shape, x_TD.shape[1]
        plan = plan_slots(ids_TK, num_experts, size)
        token_S, home_S, home_ends_T = list_slots(plan)
        slots_W, counts_We = plan.has_TW.sum(0), plan.counts_E.view(size, -1)
        routes_W = counts_We.sum(1)
        starts_W2 = torch.stack([prefix_sums(slots_W)[:-1], prefix_sums(routes_W)[:-1]], dim=1)
        about_W2 = torch.stack([torch.full_like(slots_W, num_tokens), slots_W], dim=1)
        headers_WH = torch.cat([about_W2, starts_W2, counts_We], dim=1)
        num_routes = int(routes_W.sum())
        order_N = plan.order_N[:num_routes]
        routes_N2 = torch.stack([plan.slot_N[:num_routes], order_N], dim=1)
        sent = self._outgoing(x_TD, token_S, weights_TK, order_N, slots_W.tolist(), routes_W.tolist(), wire)
        dtype, weights_dtype, num_local = x_TD.dtype, weights_TK.dtype, num_experts // size

        def write(peer: int, place: Place) -> None:
            place.map.headers(place.area)[place.source].copy_(headers_WH[peer])
            first, last = _bounds(sent.routes_W, peer)
            place.map.routes(place.area)[place.source, : last - first].copy_(routes_N2[first:last])
            sent.write(peer, place)

        def read(places: list[Place]) -> Arrived:
            headers = torch.stack([place.map.headers(place.area)[place.source] for place in places])
            received_We = headers[:, HEADER:]
            received_W = received_We.sum(1)
            tokens, taken_W, sum_starts, row_starts = headers[:, :HEADER].unbind(1)
            splits = torch.stack([routes_W, received_W, slots_W, taken_W, sum_starts, row_starts])
            known = Splits.of(splits)
            perm_R = arrival_to_expert_major(received_We, sum(known.received))
            parts = [p.map.routes(p.area)[p.source, :n] for p, n in zip(places, known.received, strict=True)]
            slot_R, route_R = torch.cat(parts).index_select(0, perm_R).unbind(1)
            source_R = torch.repeat_interleave(torch.arange(size), received_W)[perm_R]
            slot_R = slot_R.contiguous()
            first_W = prefix_sums(taken_W)
            sum_R, sum_ends = list_sums(slot_R + first_W[source_R], route_R % top_k, sum(known.taken), top_k)
            offsets_e = received_We.sum(0).cumsum(0).to(torch.int32)
            most = tokens.max().view(1)
            moves = Moves(
                plan.order_N, perm_R, token_S, home_S, home_ends_T, source_R, slot_R, sum_R, sum_ends, splits, most
            )
            rows_RD, weights_R = _take(places, moves, known, wire, width, dtype, weights_dtype)
            return Arrived(rows_RD, weights_R, offsets_e, moves)

        sizes = Sizes(
            num_experts=num_experts,
            top_k=top_k,
            width=width,
            row_bytes=wire.row_bytes(x_TD),
            max_tokens=wire.max_tokens,
        )
        return self._post(DISPATCH, sizes, num_tokens, None, _dispatch_map(sizes, num_local), write, read)

    @torch.no_grad()
    def resend(self, x_TD: Tensor, weights_TK: Tensor, moves: Moves, wire: Wire) -> Pending[tuple[Tensor, Tensor]]:
        known, width, dtype, weights_dtype = Splits.of(moves.splits), x_TD.shape[1], x_TD.dtype, weights_TK.dtype
        order_N = moves.order_N[: sum(known.sent)]
        sent = self._outgoing(x_TD, moves.token_S, weights_TK, order_N, known.slots, known.sent, wire)

        def read(places: list[Place]) -> tuple[Tensor, Tensor]:
            return _take(places, moves, known, wire, width, dtype, weights_dtype)

        sizes = Sizes(
            num_experts=0,
            top_k=weights_TK.shape[1],
            width=width,
            row_bytes=wire.row_bytes(x_TD),
            max_tokens=wire.max_tokens,
        )
        return self._post(
            RESEND, sizes, x_TD.shape[0], int(moves.most_tokens), _dispatch_map(sizes, 0), sent.write, read
        )

    @torch.no_grad()
    def return_sums(
        self, rows_RD: Tensor, weights_R: Tensor | None, moves: Moves, num_tokens: int, top_k: int, wire: Wire
    ) -> Pending[Tensor]:
        known, width, dtype = Splits.of(moves.splits), rows_RD.shape[1], rows_RD.dtype
        total = wide(dtype)

        def write(peer: int, place: Place) -> None:
            first, last = _bounds(known.taken, peer)
            start, ends = known.sum_starts[peer], moves.sum_ends_S[first : last + 1]
            if wire.format == "none":
                out_SD = place.map.rows(place.area, dtype)[start : start + last - first]
                sum_rows(rows_RD, moves.sum_R, ends, weights_R, out_SD=out_SD)
                return
            # Coded from the wide sum, which is then rounded once.
            sums = sum_rows(rows_RD, moves.sum_R, ends, weights_R, out_SD=torch.empty(last - first, width, dtype=total))
            coded = encode_rows(sums, wire.format, wire.scale)
            place.map.rows(place.area, torch.uint8)[start : start + last - first].copy_(coded)

        def read(places: list[Place]) -> Tensor:
            arrived = _decoded(
                _packed(places, sum(known.slots)), wire, width, dtype if wire.format == "none" else total
            )
            y_TD = torch.empty(num_tokens, width, dtype=dtype)
            return sum_rows(arrived, moves.home_S, moves.home_ends_T, out_SD=y_TD)

        row_bytes, num_back = wire.row_bytes(rows_RD), min(top_k, self.size)
        sizes = Sizes(num_experts=0, top_k=top_k, width=width, row_bytes=row_bytes, max_tokens=wire.max_tokens)
        return self._post(SUMS, sizes, num_tokens, int(moves.most_tokens), _return_map(sizes, num_back), write, read)

    @torch.no_grad()
    def return_rows(self, rows_RD: Tensor, moves: Moves, num_tokens: int, top_k: int, wire: Wire) -> Pending[Tensor]:
        known, width, dtype = Splits.of(moves.splits), rows_RD.shape[1], rows_RD.dtype
        num_rows, num_routes = moves.perm_R.shape[0], sum(known.sent)
        words_RB = _words(rows_RD[:num_rows], wire)
        row_of_arrival = torch.empty_like(moves.perm_R)
        row_of_arrival[moves.perm_R] = torch.arange(num_rows)

        def write(peer: int, place: Place) -> None:
            first, last = _bounds(known.received, peer)
            start = known.row_starts[peer]
            out = place.map.rows(place.area, words_RB.dtype)[start : start + last - first]
            torch.index_select(words_RB, 0, row_of_arrival[first:last], out=out)

        def read(places: list[Place]) -> Tensor:
            rows = _decoded(_packed(places, num_routes), wire, width, dtype)
            return place_routes(rows, moves.order_N[:num_routes], num_tokens, top_k)

        row_bytes = wire.row_bytes(rows_RD)
        sizes = Sizes(num_experts=0, top_k=top_k, width=width, row_bytes=row_bytes, max_tokens=wire.max_tokens)
        return self._post(ROWS, sizes, num_tokens, int(moves.most_tokens), _return_map(sizes, top_k), write, read)

    def _outgoing(
        self,
        x_TD: Tensor,
        token_S: Tensor,
        weights_TK: Tensor,
        order_N: Tensor,
        slots_W: list[int],
        routes_W: list[int],
        wire: Wire,
    ) -> _Outgoing:
        weights_N = weights_TK.detach().reshape(-1).index_select(0, order_N).to(torch.float64)
        return _Outgoing(_words(x_TD, wire), token_S, weights_N, slots_W, routes_W)

    def _post(
        self,
        operation: int,
        sizes: Sizes,
        tokens: int,
        known_tokens: int | None,
        map_of: Callable[[int, int], DispatchMap | ReturnMap],
        write: Callable[[int, Place], None],
        read: Callable[[list[Place]], Any],
    ) -> Pending[Any]:
        return self.exchange.post(Call(operation, sizes, tokens, known_tokens, map_of, write, read))


def _dispatch_map(sizes: Sizes, num_local: int) -> Callable[[int, int], DispatchMap]:
    return lambda sources, tokens: DispatchMap(sources, tokens, sizes.top_k, sizes.row_bytes, num_local)


def _return_map(sizes: Sizes, rows_a_token: int) -> Callable[[int, int], ReturnMap]:
    return lambda _, tokens: ReturnMap(tokens * rows_a_token, sizes.row_bytes)


def _take(
    places: list[Place],
    moves: Moves,
    known: Splits,
    wire: Wire,
    width: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Rows and weights of all sources, by expert, then source, then route, in memory of their own."""
    parts = [p.map.weights(p.area)[p.source, :n] for p, n in zip(places, known.received, strict=True)]
    weights_R = torch.cat(parts).index_select(0, moves.perm_R).to(weights_dtype)
    in_window = all(place.map is places[0].map for place in places)
    if in_window and wire.format == "none":
        rows, index_R = (
            _area_rows(places[0], word_dtype(places[0].map.row_bytes)),
            moves.source_R * places[0].map.tokens,
        )
        index_R = index_R + moves.slot_R
    else:
        rows = torch.cat([_source_rows(place, n) for place, n in zip(places, known.taken, strict=True)])
        rows = _as_words(_decoded(rows, wire, width, dtype))
        index_R = moves.slot_R + torch.tensor([0, *accumulate(known.taken)])[moves.source_R]
    rows_RD = torch.empty(index_R.shape[0], width, dtype=dtype)
    torch.index_select(rows, 0, index_R, out=_as_words(rows_RD))
    return rows_RD, weights_R


def _area_rows(place: Place, words: torch.dtype) -> Tensor:
    rows: Tensor = place.map.rows(place.area, words)
    return rows


def _source_rows(place: Place, num_rows: int) -> Tensor:
    """The first rows of a place's source, as bytes."""
    start = place.source * place.map.tokens
    return _area_rows(place, torch.uint8)[start : start + num_rows]


def _packed(places: list[Place], num_rows: int) -> Tensor:
    """Rows that came back, as bytes: all sources write into the one area of this rank."""
    return _area_rows(places[0], torch.uint8)[:num_rows]


def _words(rows_RD: Tensor, wire: Wire) -> Tensor:
    """Rows as they travel."""
    return _as_words(rows_RD if wire.format == "none" else encode_rows(rows_RD, wire.format, wire.scale))


def _as_words(rows: Tensor) -> Tensor:
    """A view of contiguous rows as the widest integers; a copy of others."""
    rows = rows.contiguous()
    words = word_dtype(rows.shape[1] * rows.dtype.itemsize)
    if rows.storage_offset() * rows.dtype.itemsize % words.itemsize:
        rows = rows.clone()
    return rows.view(words)


def _decoded(bytes_RB: Tensor, wire: Wire, width: int, dtype: torch.dtype) -> Tensor:
    return (
        bytes_RB.view(dtype) if wire.format == "none" else decode_rows(bytes_RB, wire.format, wire.scale, width, dtype)
    )


def _bounds(counts_W: list[int], rank: int) -> tuple[int, int]:
    """First and last of a rank's part among parts of these lengths."""
    first = sum(counts_W[:rank])
    return first, first + counts_W[rank]
