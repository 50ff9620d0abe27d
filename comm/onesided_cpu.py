"""One-sided exchange on the CPU: the four operations of `onesided.Engine` as rounds over shared memory.

    dispatch        each row once to each rank that needs it, with routes and weights; expanded there by expert
    resend          the same along a known layout: rows and weights alone
    return_sums     the expert's rank sums a token's rows there, the token's rank sums over ranks
    return_rows     every row back to its route

Legend: T tokens here, K routes a token, D width, W ranks, R rows here, N routes sent, S slots sent, e experts of a
rank, H int64s of a header.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeweave.comm.codec import encode_rows
from moeweave.comm.layout import arrival_to_expert_major
from moeweave.comm.onesided import Arrived, Moves, Splits, Wire
from moeweave.comm.onesided_rows import Like, Outgoing, bounds, decoded, packed, take, to_words
from moeweave.comm.pending import Pending
from moeweave.comm.rounds import Call, Exchange, Place
from moeweave.comm.slots import SlotPlan, list_slots, list_sums, plan_slots, prefix_sums
from moeweave.comm.transfer import place_routes, wide
from moeweave.comm.windows import HEADER, DispatchMap, ReturnMap, Sizes
from moeweave.kernels_ext.sum_rows import sum_rows

DISPATCH, RESEND, SUMS, ROWS = range(4)


class CpuEngine:
    """`onesided.Engine` over an `Exchange`."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.size = exchange.peers.size

    def close(self) -> None:
        self.exchange.close()

    @staticmethod
    def moves(tensors: list[Tensor]) -> Moves:
        return Moves(*tensors)

    def fake_moves(self, ids_TK: Tensor, new_size: Callable[[], Any]) -> list[Tensor]:
        num_rows, num_slots, num_sums = new_size(), new_size(), new_size()
        sizes = (ids_TK.numel(), num_rows, num_slots, num_slots, ids_TK.shape[0] + 1, *[num_rows] * 3, num_sums)
        integers = [ids_TK.new_empty(size, dtype=torch.int64) for size in sizes]
        splits = torch.empty(6, self.size, dtype=torch.int64, device="cpu")
        return [*integers, splits, torch.empty(1, dtype=torch.int64, device="cpu")]

    @torch.no_grad()
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, wire: Wire
    ) -> Pending[Arrived]:
        if x_TD.device.type != "cpu":
            raise ValueError(
                f"x.device ({x_TD.device}) must be cpu for dispatcher='onesided'. Use dispatcher='alltoall'."
            )
        (num_tokens, top_k), num_local = ids_TK.shape, num_experts // self.size
        plan = plan_slots(ids_TK, num_experts, self.size)
        slots = list_slots(plan)
        headers_WH = _headers(plan, num_tokens)
        splits = Splits.of(_splits(headers_WH, headers_WH))
        order_N = plan.order_N[: sum(splits.sent)]
        routes_N2 = torch.stack([plan.slot_N[: order_N.shape[0]], order_N], dim=1)
        sent = Outgoing.of(x_TD, weights_TK, slots[0], order_N, splits, wire)
        like, weights_dtype = Like(x_TD.shape[1], x_TD.dtype, wire), weights_TK.dtype

        def write(peer: int, place: Place) -> None:
            place.map.headers(place.area)[place.source].copy_(headers_WH[peer])
            first, last = bounds(sent.routes_W, peer)
            place.map.routes(place.area)[place.source, : last - first].copy_(routes_N2[first:last])
            sent.write(peer, place)

        def read(places: list[Place]) -> Arrived:
            arrived_WH = torch.stack([place.map.headers(place.area)[place.source] for place in places])
            moves = _moves(plan, slots, headers_WH, arrived_WH, places, top_k)
            rows_RD, weights_R = take(places, moves, Splits.of(moves.splits), like, weights_dtype)
            offsets_e = arrived_WH[:, HEADER:].sum(0).cumsum(0).to(torch.int32)
            return Arrived(rows_RD, weights_R, offsets_e, moves)

        sizes = _sizes(x_TD, top_k, wire, num_experts)
        return self._post(DISPATCH, sizes, num_tokens, None, partial(_dispatch_map, sizes, num_local), write, read)

    @torch.no_grad()
    def resend(self, x_TD: Tensor, weights_TK: Tensor, moves: Moves, wire: Wire) -> Pending[tuple[Tensor, Tensor]]:
        known, like, weights_dtype = Splits.of(moves.splits), Like(x_TD.shape[1], x_TD.dtype, wire), weights_TK.dtype
        sent = Outgoing.of(x_TD, weights_TK, moves.token_S, moves.order_N[: sum(known.sent)], known, wire)

        def read(places: list[Place]) -> tuple[Tensor, Tensor]:
            return take(places, moves, known, like, weights_dtype)

        sizes, most = _sizes(x_TD, weights_TK.shape[1], wire), int(moves.most_tokens)
        return self._post(RESEND, sizes, x_TD.shape[0], most, partial(_dispatch_map, sizes, 0), sent.write, read)

    @torch.no_grad()
    def return_sums(
        self, rows_RD: Tensor, weights_R: Tensor | None, moves: Moves, num_tokens: int, top_k: int, wire: Wire
    ) -> Pending[Tensor]:
        known, width, dtype = Splits.of(moves.splits), rows_RD.shape[1], rows_RD.dtype
        # Coded from the wide sum, which is then rounded once.
        summed = dtype if wire.format == "none" else wide(dtype)

        def write(peer: int, place: Place) -> None:
            first, last = bounds(known.taken, peer)
            part, ends_S = slice(known.sum_starts[peer], known.sum_starts[peer] + last - first), slice(first, last + 1)
            sum_of = partial(sum_rows, rows_RD, moves.sum_R, moves.sum_ends_S[ends_S], weights_R)
            if wire.format == "none":
                sum_of(out_SD=place.map.rows(place.area, dtype)[part])
                return
            sums_SD = sum_of(out_SD=torch.empty(last - first, width, dtype=summed))
            place.map.rows(place.area, torch.uint8)[part].copy_(encode_rows(sums_SD, wire.format, wire.scale))

        def read(places: list[Place]) -> Tensor:
            sums_SD = decoded(packed(places, sum(known.slots)), Like(width, summed, wire))
            y_TD = torch.empty(num_tokens, width, dtype=dtype)
            return sum_rows(sums_SD, moves.home_S, moves.home_ends_T, out_SD=y_TD)

        sizes, most = _sizes(rows_RD, top_k, wire), int(moves.most_tokens)
        area_map = partial(_return_map, sizes, min(top_k, self.size))
        return self._post(SUMS, sizes, num_tokens, most, area_map, write, read)

    @torch.no_grad()
    def return_rows(self, rows_RD: Tensor, moves: Moves, num_tokens: int, top_k: int, wire: Wire) -> Pending[Tensor]:
        known, like = Splits.of(moves.splits), Like(rows_RD.shape[1], rows_RD.dtype, wire)
        num_rows, num_routes = moves.perm_R.shape[0], sum(known.sent)
        words_RB = to_words(rows_RD[:num_rows], wire)
        row_of_arrival = torch.empty_like(moves.perm_R)
        row_of_arrival[moves.perm_R] = torch.arange(num_rows)

        def write(peer: int, place: Place) -> None:
            first, last = bounds(known.received, peer)
            start = known.row_starts[peer]
            out = place.map.rows(place.area, words_RB.dtype)[start : start + last - first]
            torch.index_select(words_RB, 0, row_of_arrival[first:last], out=out)

        def read(places: list[Place]) -> Tensor:
            rows = decoded(packed(places, num_routes), like)
            return place_routes(rows, moves.order_N[:num_routes], num_tokens, top_k)

        sizes, most = _sizes(rows_RD, top_k, wire), int(moves.most_tokens)
        return self._post(ROWS, sizes, num_tokens, most, partial(_return_map, sizes, top_k), write, read)

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


def _headers(plan: SlotPlan, num_tokens: int) -> Tensor:
    """What each rank is told [W, H]: tokens here, slots, where its sums and its rows start on their way back,
    counts."""
    slots_W = plan.has_TW.sum(0)
    counts_We = plan.counts_E.view(slots_W.shape[0], -1)
    starts_W2 = torch.stack([prefix_sums(slots_W)[:-1], prefix_sums(counts_We.sum(1))[:-1]], dim=1)
    about_W2 = torch.stack([torch.full_like(slots_W, num_tokens), slots_W], dim=1)
    return torch.cat([about_W2, starts_W2, counts_We], dim=1)


def _splits(sent_WH: Tensor, arrived_WH: Tensor) -> Tensor:
    """`Moves.splits` from the headers that went out and those that came."""
    _, taken_W, sum_starts_W, row_starts_W = arrived_WH[:, :HEADER].unbind(1)
    routes = [each[:, HEADER:].sum(1) for each in (sent_WH, arrived_WH)]
    return torch.stack([*routes, sent_WH[:, 1], taken_W, sum_starts_W, row_starts_W])


def _moves(
    plan: SlotPlan,
    slots: tuple[Tensor, Tensor, Tensor],
    sent_WH: Tensor,
    arrived_WH: Tensor,
    places: list[Place],
    top_k: int,
) -> Moves:
    """The layout, from this rank's slots and the routes that all sources name."""
    splits = _splits(sent_WH, arrived_WH)
    known, received_We = Splits.of(splits), arrived_WH[:, HEADER:]
    perm_R = arrival_to_expert_major(received_We, sum(known.received))
    parts = [p.map.routes(p.area)[p.source, :n] for p, n in zip(places, known.received, strict=True)]
    slot_R, route_R = torch.cat(parts).index_select(0, perm_R).t().contiguous().unbind(0)
    source_R = torch.repeat_interleave(torch.arange(len(places)), splits[1]).index_select(0, perm_R)
    over_all_R = slot_R + prefix_sums(splits[3])[source_R]
    sum_R, sum_ends_S = list_sums(over_all_R, route_R % top_k, sum(known.taken), top_k)
    most_tokens = arrived_WH[:, 0].max().view(1)
    return Moves(plan.order_N, perm_R, *slots, source_R, slot_R.clone(), sum_R, sum_ends_S, splits, most_tokens)


def _sizes(rows: Tensor, top_k: int, wire: Wire, num_experts: int = 0) -> Sizes:
    row_bytes, width = wire.row_bytes(rows), rows.shape[1]
    return Sizes(num_experts=num_experts, top_k=top_k, width=width, row_bytes=row_bytes, max_tokens=wire.max_tokens)


def _dispatch_map(sizes: Sizes, num_local: int, sources: int, tokens: int) -> DispatchMap:
    return DispatchMap(sources, tokens, sizes.top_k, sizes.row_bytes, num_local)


def _return_map(sizes: Sizes, rows_a_token: int, _sources: int, tokens: int) -> ReturnMap:
    return ReturnMap(tokens * rows_a_token, sizes.row_bytes)
