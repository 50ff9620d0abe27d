"""One-sided exchange inside nodes, one aggregated exchange between them: the four operations of `onesided.Engine`.

    dispatch, resend   a token crosses the network once to each node that needs it, to the rank in its sender's place,
                       coded; decoded there and written once to each rank of that node that needs it
    return_sums        summed inside the node in float32; one coded row a token and node crosses back
    return_rows        [K, D] a token and node cross back: for rows of width one, the gradient of the weights

256 experts, top-8, 2 nodes of 4 ranks: 1.00 rows a token cross the network, in place of the 4.0 of an all-to-all.

Rows end in the order of the other dispatchers, by expert, source rank and route, without a copy more: inside the node,
expert e of source node m is expert e * M + m.

Legend: T tokens here, K routes a token, D width, M nodes, L ranks of a node, S tokens that a rank sends or takes, a
token and node each, B bytes of a row on the link, R rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeweave.comm.communicator import Communicator
from moeweave.comm.nodes import Nodes
from moeweave.comm.onesided import Arrived, Engine, Moves, Wire
from moeweave.comm.onesided_rows import Like, decoded, to_words
from moeweave.comm.pending import Pending
from moeweave.comm.slots import list_slots, plan_slots
from moeweave.comm.transfer import wide
from moeweave.comm.two_planes import joined
from moeweave.kernels_ext.sum_rows import sum_rows


class NodeMoves(NamedTuple):
    """Where every row went: between nodes, then inside one.

    Attributes:
        token_S, home_S, home_ends_T: as in `Moves`, with nodes in the place of ranks.
        splits: int64 [2, M] on the host, tokens sent to and taken from each node.
        inside: of the exchange inside this node.
    """

    token_S: Tensor
    home_S: Tensor
    home_ends_T: Tensor
    splits: Tensor
    inside: Moves

    @property
    def tensors(self) -> list[Tensor]:
        return [*self[:4], *self.inside]

    @property
    def perm_R(self) -> Tensor:
        return self.inside.perm_R

    @property
    def num_taken(self) -> int:
        return int(self.splits[1].sum())


class NodeEngine:
    """`onesided.Engine` over an engine inside the node and collectives between nodes.

    Args:
        nodes: how the group's ranks lie.
        inside: engine of this rank's scale-up group. across: this rank's scale-out group.
    """

    def __init__(self, nodes: Nodes, inside: Engine, across: Communicator) -> None:
        self.nodes, self.inside, self.across = nodes, inside, across
        self.size = nodes.num_nodes * nodes.ranks_per_node

    def close(self) -> None:
        self.inside.close()

    @staticmethod
    def moves(tensors: list[Tensor]) -> NodeMoves:
        token_S, home_S, home_ends_T, splits, *inside = tensors
        return NodeMoves(token_S, home_S, home_ends_T, splits, Moves(*inside))

    def fake_moves(self, ids_TK: Tensor, new_size: Callable[[], Any]) -> list[Tensor]:
        num_sent, num_taken, (num_tokens, top_k) = new_size(), new_size(), ids_TK.shape
        sizes = (num_sent, num_sent, num_tokens + 1)
        across = [ids_TK.new_empty(size, dtype=torch.int64) for size in sizes]
        splits = torch.empty(2, self.nodes.num_nodes, dtype=torch.int64, device="cpu")
        return [*across, splits, *self.inside.fake_moves(ids_TK.new_empty(num_taken, top_k), new_size)]

    @torch.no_grad()
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, wire: Wire
    ) -> Pending[Arrived]:
        token_S, home_S, home_ends_T, splits = slots_across(ids_TK, num_experts, self.across)
        about = self._go(about_tokens(ids_TK, weights_TK).index_select(0, token_S), splits)
        rows = self._send(x_TD, token_S, splits, wire)
        weights_dtype, top_k = weights_TK.dtype, ids_TK.shape[1]

        def finish() -> Arrived:
            about_SB = about.wait()
            ids_SK, weights_SK = split_about(about_SB, top_k, weights_dtype)
            ids_SK = ids_inside(ids_SK, splits[1].tolist(), num_experts, self.across.rank)
            # While the rows are on the network, their layout inside the node is made with rows of one number.
            thin_S1 = weights_SK.new_zeros(ids_SK.shape[0], 1, dtype=torch.float32)
            thin = self.inside.dispatch(thin_S1, ids_SK, weights_SK, num_experts, self._room(wire)).wait()
            offsets_e = thin.offsets_e[self.nodes.num_nodes - 1 :: self.nodes.num_nodes].contiguous()
            moves = NodeMoves(token_S, home_S, home_ends_T, splits, thin.moves)
            rows_RD, weights_R = self.inside.resend(rows.wait(), weights_SK, thin.moves, self._room(wire)).wait()
            return Arrived(rows_RD, weights_R, offsets_e, moves)

        return Pending(finish)

    @torch.no_grad()
    def resend(self, x_TD: Tensor, weights_TK: Tensor, moves: NodeMoves, wire: Wire) -> Pending[tuple[Tensor, Tensor]]:
        weights = self._go(weights_TK.detach().index_select(0, moves.token_S), moves.splits)
        rows = self._send(x_TD, moves.token_S, moves.splits, wire)

        def finish() -> tuple[Tensor, Tensor]:
            weights_SK = weights.wait()
            return self.inside.resend(rows.wait(), weights_SK, moves.inside, self._room(wire)).wait()

        return Pending(finish)

    @torch.no_grad()
    def return_sums(
        self, rows_RD: Tensor, weights_R: Tensor | None, moves: NodeMoves, num_tokens: int, top_k: int, wire: Wire
    ) -> Pending[Tensor]:
        width, dtype = rows_RD.shape[1], rows_RD.dtype
        summed = wide(dtype)
        # Wide inside the node: what crosses the network has been rounded once.
        inside = (rows_RD.to(summed), weights_R, moves.inside, moves.num_taken, top_k, self._room(wire))
        posted = self.inside.return_sums(*inside)

        def finish() -> Tensor:
            sums_SD = posted.wait()
            sent = sums_SD.to(dtype) if wire.format == "none" else sums_SD
            words = self._go(to_words(sent, wire), moves.splits.flip(0)).wait()
            back_SD = decoded(as_bytes(words), Like(width, sent.dtype, wire))
            return sum_rows(
                back_SD, moves.home_S, moves.home_ends_T, out_SD=torch.empty(num_tokens, width, dtype=dtype)
            )

        return Pending(finish)

    @torch.no_grad()
    def return_rows(
        self, rows_RD: Tensor, moves: NodeMoves, num_tokens: int, top_k: int, wire: Wire
    ) -> Pending[Tensor]:
        assert wire.format == "none", "rows that cross unsummed are not coded"
        width = rows_RD.shape[1]
        posted = self.inside.return_rows(rows_RD, moves.inside, moves.num_taken, top_k, self._room(wire))

        def finish() -> Tensor:
            routes_SN = posted.wait().flatten(1)
            back_SN = self._go(routes_SN, moves.splits.flip(0)).wait()
            # A route lies on one node: the others' zeros change nothing.
            out_TN = torch.empty(num_tokens, back_SN.shape[1], dtype=back_SN.dtype)
            return sum_rows(back_SN, moves.home_S, moves.home_ends_T, out_SD=out_TN).view(num_tokens, top_k, width)

        return Pending(finish)

    def _send(self, x_TD: Tensor, token_S: Tensor, splits: Tensor, wire: Wire) -> Pending[Tensor]:
        """Rows [T, D] to the nodes that need them -> x_SD of all nodes; this node's own decoded meanwhile."""
        like, node = Like(x_TD.shape[1], x_TD.dtype, wire), self.across.rank
        words_SB = to_words(x_TD.detach(), wire).index_select(0, token_S)
        rows = self._go(words_SB, splits)
        if wire.format == "none":
            return Pending(lambda: decoded(as_bytes(rows.wait()), like))
        sent, taken = splits.tolist()
        own = slice(sum(taken[:node]), sum(taken[: node + 1]))
        x_SD = x_TD.new_empty(sum(taken), like.width)
        first = sum(sent[:node])
        x_SD[own] = decoded(as_bytes(words_SB[first : first + sent[node]]), like)

        def finish() -> Tensor:
            arrived_SB = as_bytes(rows.wait())
            for part in (slice(own.start), slice(own.stop, None)):
                x_SD[part] = decoded(arrived_SB[part], like)
            return x_SD

        return Pending(finish)

    def _go(self, rows: Tensor, splits: Tensor) -> Pending[Tensor]:
        """Rows by node, to this rank's place on each; splits [2, M]: how many go and come."""
        sent, taken = splits.tolist()
        return joined(*self.across.all_to_all(rows, sent, taken, async_op=True))

    def _room(self, wire: Wire) -> Wire:
        """Inside a node rows are as they are; each rank spreads what it took from all nodes."""
        return Wire(max_tokens=wire.max_tokens * self.nodes.num_nodes)


def slots_across(ids_TK: Tensor, num_experts: int, across: Communicator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_S, home_S, home_ends_T and splits of `NodeMoves`, by an exchange of counts between the nodes."""
    plan = plan_slots(ids_TK, num_experts, across.size)
    sends_M = plan.has_TW.sum(0)
    return *list_slots(plan), torch.stack([sends_M, across.swap(sends_M.unsqueeze(1)).squeeze(1)])


def about_tokens(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What goes with each token: ids as int32, then weights, as bytes [T, B]."""
    return torch.cat([as_bytes(ids_TK.to(torch.int32)), as_bytes(weights_TK.detach())], dim=1)


def split_about(about_SB: Tensor, top_k: int, weights_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The way back of `about_tokens`: ids_SK, weights_SK."""
    ids_SK = about_SB[:, : 4 * top_k].contiguous().view(torch.int32).long()
    return ids_SK, about_SB[:, 4 * top_k :].contiguous().view(weights_dtype)


def ids_inside(ids_SK: Tensor, taken_M: Sequence[int], num_experts: int, node: int) -> Tensor:
    """Expert ids over the group -> over this node, e * M + m; -1 for routes to other nodes and to none.

    Args:
        ids_SK: of tokens by the node that they come from.
        taken_M: how many come from each node. node: this one.
    """
    num_nodes = len(taken_M)
    num_here = num_experts // num_nodes
    local_SK = ids_SK - node * num_here
    source_S1 = torch.repeat_interleave(torch.arange(num_nodes), torch.tensor(taken_M)).unsqueeze(1)
    here_SK = (local_SK >= 0) & (local_SK < num_here)
    return torch.where(here_SK, local_SK * num_nodes + source_S1, -1)


def as_bytes(rows: Tensor) -> Tensor:
    """Rows [N, D] as bytes [N, B]."""
    # Flat first: a contiguous tensor of one column or no row may have any stride, and then has no view as bytes.
    return rows.contiguous().flatten().view(torch.uint8).view(rows.shape[0], rows.shape[1] * rows.element_size())
