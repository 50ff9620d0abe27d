"""Rows on their way through a window: coded and cut up for writing, gathered and decoded when read.

Rows are copied as words (`word_dtype`), whatever their dtype; each is written once into the window and read once from
it.

Legend: T tokens here, B bytes of a row on the link, W ranks, R rows here, N routes sent, S slots sent.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moeweave.comm.codec import decode_rows, encode_rows
from moeweave.comm.onesided import Moves, Splits, Wire
from moeweave.comm.rounds import Place
from moeweave.comm.windows import word_dtype


class Like(NamedTuple):
    """What rows become when they are read."""

    width: int
    dtype: torch.dtype
    wire: Wire


class Outgoing(NamedTuple):
    """Rows and weights that a rank sends, by destination.

    Attributes:
        words_TB: tokens as they travel.  token_S: the token of each slot.  weights_N: float64, of the routes by expert.
        slots_W, routes_W: how many of them go to each rank.
    """

    words_TB: Tensor
    token_S: Tensor
    weights_N: Tensor
    slots_W: list[int]
    routes_W: list[int]

    @classmethod
    def of(
        cls, x_TD: Tensor, weights_TK: Tensor, token_S: Tensor, order_N: Tensor, splits: Splits, wire: Wire
    ) -> Outgoing:
        """`order_N` holds the routed ones only."""
        weights_N = weights_TK.detach().reshape(-1).index_select(0, order_N).to(torch.float64)
        return cls(to_words(x_TD, wire), token_S, weights_N, splits.slots, splits.sent)

    def write(self, peer: int, place: Place) -> None:
        first, last = bounds(self.slots_W, peer)
        start = place.source * place.map.tokens
        rows = place.map.rows(place.area, self.words_TB.dtype)[start : start + last - first]
        torch.index_select(self.words_TB, 0, self.token_S[first:last], out=rows)
        first, last = bounds(self.routes_W, peer)
        place.map.weights(place.area)[place.source, : last - first].copy_(self.weights_N[first:last])


def take(
    places: list[Place], moves: Moves, known: Splits, like: Like, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows and weights of all sources, by expert, then source, then route, in memory of their own."""
    parts = [p.map.weights(p.area)[p.source, :n] for p, n in zip(places, known.received, strict=True)]
    weights_R = torch.cat(parts).index_select(0, moves.perm_R).to(weights_dtype)
    in_window = all(place.map is places[0].map for place in places)
    if in_window and like.wire.format == "none":
        area_map = places[0].map
        rows = area_rows(places[0], word_dtype(area_map.row_bytes))
        index_R = moves.source_R * area_map.tokens + moves.slot_R
    else:
        rows = torch.cat([source_rows(place, n) for place, n in zip(places, known.taken, strict=True)])
        rows = as_words(decoded(rows, like))
        index_R = moves.slot_R + torch.tensor([0, *accumulate(known.taken)])[moves.source_R]
    rows_RD = torch.empty(index_R.shape[0], like.width, dtype=like.dtype)
    torch.index_select(rows, 0, index_R, out=as_words(rows_RD))
    return rows_RD, weights_R


def area_rows(place: Place, words: torch.dtype) -> Tensor:
    """All rows of the area, of every source."""
    rows: Tensor = place.map.rows(place.area, words)
    return rows


def source_rows(place: Place, num_rows: int) -> Tensor:
    """The first rows of a place's source, as bytes."""
    start = place.source * place.map.tokens
    return area_rows(place, torch.uint8)[start : start + num_rows]


def packed(places: list[Place], num_rows: int) -> Tensor:
    """Rows that came back, as bytes: all sources write into the one area of this rank."""
    return area_rows(places[0], torch.uint8)[:num_rows]


def to_words(rows_RD: Tensor, wire: Wire) -> Tensor:
    """Rows as they travel."""
    return as_words(rows_RD if wire.format == "none" else encode_rows(rows_RD, wire.format, wire.scale))


def as_words(rows: Tensor) -> Tensor:
    """A view of contiguous rows as the widest integers; a copy of others."""
    rows = rows.contiguous()
    words = word_dtype(rows.shape[1] * rows.dtype.itemsize)
    if rows.storage_offset() * rows.dtype.itemsize % words.itemsize:
        rows = rows.clone()
    return rows.view(words)


def decoded(bytes_RB: Tensor, like: Like) -> Tensor:
    """Rows as they travelled -> [R, D]; of rows without a code a view."""
    if like.wire.format == "none":
        return bytes_RB.view(like.dtype)
    return decode_rows(bytes_RB, like.wire.format, like.wire.scale, like.width, like.dtype)


def bounds(counts_W: list[int], rank: int) -> tuple[int, int]:
    """First and last of a rank's part among parts of these lengths."""
    first = sum(counts_W[:rank])
    return first, first + counts_W[rank]
