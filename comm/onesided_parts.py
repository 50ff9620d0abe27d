"""The exchange by nodes in parts: while one part of the rows is on the network, another spreads inside the node.

    dma    part 1 crosses          part 2 crosses          ...
    push   own node's rows spread  part 1 spreads          part 2 spreads

The way back has the same parts, each summed in the node before it crosses; own rows are summed while the last crosses.
Part 0 holds rows that stay on their node. Every other part holds the same share of the rows from and to each other
node, so that sizes follow from what `NodeEngine` exchanges. Values and the order of rows are those of `NodeEngine`, bit
by bit, for a copy of the rows more: parts arrive one by one and are put together by expert.

Example, 2 nodes, 10 tokens to this node and 7 to the other, 2 parts: part 0 is the 10, the others are 3 and 4 of the 7.

Legend: T tokens here, K routes a token, D width, M nodes, S tokens that a rank sends or takes, a token and node each, B
bytes of a row on the link, R rows here, P parts, V = experts here * M.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeweave.comm.communicator import Communicator
from moeweave.comm.nodes import Nodes
from moeweave.comm.onesided import Arrived, Engine, Moves, Wire
from moeweave.comm.onesided_nodes import about_tokens, as_bytes, ids_inside, slots_across, split_about
from moeweave.comm.onesided_rows import Like, decoded, to_words
from moeweave.comm.pending import Pending
from moeweave.comm.streams import Streams
from moeweave.comm.transfer import wide
from moeweave.comm.two_planes import joined
from moeweave.kernels_ext.sum_rows import sum_rows

NUM_FIELDS = len(Moves._fields)


class PartMoves(NamedTuple):
    """Where every row went: between nodes, then inside one, part by part.

    Attributes:
        token_S, home_S, home_ends_T, splits: as in `NodeMoves`.
        perm_R: the row, by expert, of each row of the parts, one part after the other.
        parts: of each part's exchange inside this node.
    """

    token_S: Tensor
    home_S: Tensor
    home_ends_T: Tensor
    splits: Tensor
    perm_R: Tensor
    parts: tuple[Moves, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self[:5], *(tensor for part in self.parts for tensor in part)]

    @property
    def inside(self) -> Moves:
        """Of the first part."""
        return self.parts[0]

    @property
    def places(self) -> tuple[Tensor, ...]:
        """`perm_R` of each part."""
        return self.perm_R.split([part.perm_R.shape[0] for part in self.parts])


class PartEngine:
    """`onesided.Engine` over an engine inside the node, and two groups between nodes.

    Args:
        nodes: how the group's ranks lie.
        inside: engine of this rank's scale-up group.
        about, across: its scale-out group twice: of counts, ids and weights, and of rows, whose turn comes later.
        streams: rows cross on "dma" and spread on "push".
        num_parts: of the rows that cross. 0: all rows cross before any spreads.
    """

    def __init__(
        self, nodes: Nodes, inside: Engine, about: Communicator, across: Communicator, streams: Streams, num_parts: int
    ) -> None:
        self.nodes, self.inside, self.about, self.across, self.streams = nodes, inside, about, across, streams
        self.size = nodes.num_nodes * nodes.ranks_per_node
        self.num_parts = num_parts if nodes.num_nodes > 1 else 0
        self.own_first = self.num_parts > 0 or nodes.num_nodes == 1

    def close(self) -> None:
        self.inside.close()

    @staticmethod
    def moves(tensors: list[Tensor]) -> PartMoves:
        token_S, home_S, home_ends_T, splits, perm_R, *rest = tensors
        parts = tuple(Moves(*rest[at : at + NUM_FIELDS]) for at in range(0, len(rest), NUM_FIELDS))
        return PartMoves(token_S, home_S, home_ends_T, splits, perm_R, parts)

    def fake_moves(self, ids_TK: Tensor, new_size: Callable[[], Any]) -> list[Tensor]:
        raise RuntimeError(
            "form ('hierarchical') must run outside of compiled code, which has no streams. Use a dispatcher there: "
            "make_dispatcher('hierarchical')."
        )

    @torch.no_grad()
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, wire: Wire
    ) -> Pending[Arrived]:
        token_S, home_S, home_ends_T, splits = slots_across(ids_TK, num_experts, self.about)
        about_SB = about_tokens(ids_TK, weights_TK).index_select(0, token_S)

        def spread(part: int, x_SD: Tensor, part_SB: Tensor) -> Pending[Arrived]:
            ids_SK, weights_SK = split_about(part_SB, ids_TK.shape[1], weights_TK.dtype)
            taken_M = [last - first for first, last in self._bounds(splits[1].tolist(), part)]
            ids_SK = ids_inside(ids_SK, taken_M, num_experts, self.about.rank)
            return self.inside.dispatch(x_SD, ids_SK, weights_SK, num_experts, self._room(wire))

        posted = self._there(x_TD, token_S, about_SB, splits, wire, spread)

        def finish() -> Arrived:
            arrived = posted.wait()
            perm_R = self._by_expert(arrived)
            moves = PartMoves(token_S, home_S, home_ends_T, splits, perm_R, tuple(part.moves for part in arrived))
            rows_RD, weights_R = _together(moves, [part[:2] for part in arrived])
            ends_PV, num_nodes = torch.stack([part.offsets_e for part in arrived]), self.nodes.num_nodes
            offsets_e = ends_PV[:, num_nodes - 1 :: num_nodes].sum(0, dtype=torch.int32)
            return Arrived(rows_RD, weights_R, offsets_e, moves)

        return Pending(finish)

    @torch.no_grad()
    def resend(self, x_TD: Tensor, weights_TK: Tensor, moves: PartMoves, wire: Wire) -> Pending[tuple[Tensor, Tensor]]:
        about_SB = as_bytes(weights_TK.detach().index_select(0, moves.token_S))

        def spread(part: int, x_SD: Tensor, part_SB: Tensor) -> Pending[tuple[Tensor, Tensor]]:
            weights_SK = part_SB.view(weights_TK.dtype)
            return self.inside.resend(x_SD, weights_SK, moves.parts[part], self._room(wire))

        posted = self._there(x_TD, moves.token_S, about_SB, moves.splits, wire, spread)
        return Pending(lambda: _together(moves, posted.wait()))

    @torch.no_grad()
    def return_sums(
        self, rows_RD: Tensor, weights_R: Tensor | None, moves: PartMoves, num_tokens: int, top_k: int, wire: Wire
    ) -> Pending[Tensor]:
        width, dtype = rows_RD.shape[1], rows_RD.dtype
        summed = wide(dtype)
        sent = dtype if wire.format == "none" else summed

        def sums_of(part: int) -> Pending[Tensor]:
            place_R, taken = moves.places[part], self._size(moves.splits[1], part)
            weights = None if weights_R is None else weights_R.index_select(0, place_R)
            rows = rows_RD.index_select(0, place_R).to(summed)
            return self.inside.return_sums(rows, weights, moves.parts[part], taken, top_k, self._room(wire))

        posted = self._back(sums_of, lambda sums_SD: as_bytes(to_words(sums_SD.to(sent), wire)), moves.splits)

        def finish() -> Tensor:
            back_SD = decoded(posted.wait(), Like(width, sent, wire))
            out_TD = torch.empty(num_tokens, width, dtype=dtype)
            return sum_rows(back_SD, moves.home_S, moves.home_ends_T, out_SD=out_TD)

        return Pending(finish)

    @torch.no_grad()
    def return_rows(
        self, rows_RD: Tensor, moves: PartMoves, num_tokens: int, top_k: int, wire: Wire
    ) -> Pending[Tensor]:
        assert wire.format == "none", "rows that cross unsummed are not coded"
        width, dtype = rows_RD.shape[1], rows_RD.dtype

        def routes_of(part: int) -> Pending[Tensor]:
            rows, taken = rows_RD.index_select(0, moves.places[part]), self._size(moves.splits[1], part)
            return self.inside.return_rows(rows, moves.parts[part], taken, top_k, self._room(wire))

        posted = self._back(routes_of, lambda routes_SKD: as_bytes(routes_SKD.flatten(1)), moves.splits)

        def finish() -> Tensor:
            out_TN = torch.empty(num_tokens, top_k * width, dtype=dtype)
            sum_rows(posted.wait().view(dtype), moves.home_S, moves.home_ends_T, out_SD=out_TN)
            return out_TN.view(num_tokens, top_k, width)

        return Pending(finish)

    def _there(
        self,
        x_TD: Tensor,
        token_S: Tensor,
        about_SB: Tensor,
        splits: Tensor,
        wire: Wire,
        spread: Callable[[int, Tensor, Tensor], Pending[Any]],
    ) -> Pending[list[Any]]:
        """Rows [T, D] to the nodes that need them, and there by `spread(part, x_SD, about_SB)` -> its results."""
        like, words_TB = Like(x_TD.shape[1], x_TD.dtype, wire), to_words(x_TD.detach(), wire)
        sent, taken = splits.tolist()
        about = self.streams.start("push", "ids and weights", partial(_go, self.about, about_SB, sent, taken))

        def cross(part: int) -> Pending[Tensor]:
            pick_S = _listed(self._bounds(sent, part))
            words_SB = words_TB.index_select(0, token_S.index_select(0, pick_S))
            return _go(self.across, words_SB, self._lengths(sent, part), self._lengths(taken, part))

        def start(part: int, words_SB: Tensor, about_SB: Tensor) -> Pending[Any]:
            x_SD = decoded(as_bytes(words_SB), like)
            return self.streams.start("push", f"spread {part}", partial(spread, part, x_SD, about_SB))

        crossing = {part: self.streams.start("dma", f"rows {part}", partial(cross, part)) for part in self._crossing}
        own = []
        if self.own_first:
            pick_S = _listed(self._bounds(sent, 0))
            words_SB = words_TB.index_select(0, token_S.index_select(0, pick_S))
            own.append(start(0, words_SB, about_SB.index_select(0, pick_S)))

        def finish() -> list[Any]:
            arrived, all_SB = [pending.wait() for pending in own], about.wait()
            for part, words in crossing.items():
                part_SB = all_SB.index_select(0, _listed(self._bounds(taken, part)))
                arrived.append(start(part, words.wait(), part_SB).wait())
            return arrived

        return Pending(finish)

    def _back(
        self, made: Callable[[int], Pending[Tensor]], coded: Callable[[Tensor], Tensor], splits: Tensor
    ) -> Pending[Tensor]:
        """What `made(part)` brings [S, ...], `coded` as bytes, back to where its tokens came from -> [S, B]."""
        sent, taken = splits.tolist()
        crossing: dict[int, Pending[Tensor]] = {}

        def gather(part: int) -> Pending[Tensor]:
            return self.streams.start("push", f"sums {part}", partial(made, part))

        for part in self._crossing:
            ways = self._lengths(taken, part), self._lengths(sent, part)
            go = partial(_go, self.across, coded(gather(part).wait()), *ways)
            crossing[part] = self.streams.start("dma", f"results {part}", go)
        own = [gather(0)] if self.own_first else []

        def finish() -> Tensor:
            parts = [coded(pending.wait()) for pending in own]
            parts += [pending.wait() for pending in crossing.values()]
            back_SB = torch.empty(sum(sent), parts[0].shape[1], dtype=torch.uint8)
            for part, rows in enumerate(parts):
                back_SB.index_copy_(0, _listed(self._bounds(sent, part)), rows)
            return back_SB

        return Pending(finish)

    @property
    def _crossing(self) -> range:
        """The parts that cross the network."""
        return range(int(self.own_first), self.num_parts + 1)

    def _bounds(self, counts_M: list[int], part: int) -> list[tuple[int, int]]:
        """First and last of each node's rows that a part holds, among rows by node."""
        if not self.own_first:
            return [(end - count, end) for end, count in zip(accumulate(counts_M), counts_M, strict=True)]
        found = []
        for node, (start, count) in enumerate(zip(accumulate(counts_M, initial=0), counts_M, strict=False)):
            if (node == self.about.rank) != (part == 0):
                found.append((start, start))
            elif part == 0:
                found.append((start, start + count))
            else:
                found.append((start + count * (part - 1) // self.num_parts, start + count * part // self.num_parts))
        return found

    def _lengths(self, counts_M: list[int], part: int) -> list[int]:
        return [last - first for first, last in self._bounds(counts_M, part)]

    def _size(self, counts_M: Tensor, part: int) -> int:
        return sum(self._lengths(counts_M.tolist(), part))

    def _by_expert(self, arrived: list[Arrived]) -> Tensor:
        """`PartMoves.perm_R`: rows by expert and node, then source rank of the node, then token: parts in order."""
        keys = []
        for part in arrived:
            counts_V = part.offsets_e.diff(prepend=part.offsets_e.new_zeros(1)).long()
            expert_R = torch.repeat_interleave(torch.arange(counts_V.shape[0]), counts_V)
            keys.append(expert_R * self.nodes.ranks_per_node + part.moves.source_R)
        order_R = torch.argsort(torch.cat(keys), stable=True)
        return torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(order_R.shape[0]))

    def _room(self, wire: Wire) -> Wire:
        return Wire(max_tokens=wire.max_tokens * self.nodes.num_nodes)


def _go(comm: Communicator, rows: Tensor, sends: list[int], takes: list[int]) -> Pending[Tensor]:
    return joined(*comm.all_to_all(rows, sends, takes, async_op=True))


def _listed(bounds: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(first, last) for first, last in bounds])


def _together(moves: PartMoves, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows and weights of the parts -> by expert."""
    (rows, weights), num_rows = parts[0], moves.perm_R.shape[0]
    rows_RD, weights_R = rows.new_empty(num_rows, rows.shape[1]), weights.new_empty(num_rows)
    for place_R, (rows, weights) in zip(moves.places, parts, strict=True):
        rows_RD.index_copy_(0, place_R, rows)
        weights_R.index_copy_(0, place_R, weights)
    return rows_RD, weights_R
