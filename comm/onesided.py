"""What a one-sided exchange is, whatever the memory: an engine's four operations, and where rows went.

    dispatch      tokens to the ranks of their experts, a row once to each rank, expanded there to expert-major order
    resend        other tokens along the same routes
    return_sums   the way back summed on the experts' ranks first: a row a token and rank
    return_rows   the way back row by row: a row a route

Operators name their engine by a string, as they take no objects; an engine lives as long as its group.

Legend: T tokens here, K routes a token, N = T * K, D width, W ranks, R rows here, S slots sent, e experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moeweave.comm.codec import wire_width
from moeweave.comm.pending import Pending


class Wire(NamedTuple):
    """What rows look like on the link, as in `Codec`, and how many tokens of a rank there is room for (0: it grows)."""

    format: str = "none"
    scale: str = "token"
    max_tokens: int = 0

    def row_bytes(self, rows_RD: Tensor) -> int:
        return wire_width(self.format, self.scale, rows_RD.shape[1], rows_RD.dtype)


class Moves(NamedTuple):
    """Where every row of a dispatch went: integers only, for the way back and for a dispatch of the same routes.

    Attributes:
        order_N: routes of this rank by expert, those that go nowhere last.
        perm_R: `rows_RD[r]` is route `perm_R[r]` in arrival order: by source, then expert, then route.
        token_S, home_S, home_ends_T: as from `slots.list_slots`; home_ends_T has T + 1 entries.
        source_R, slot_R: source rank of each row, and the slot that it came in.
        sum_R, sum_ends_S: as from `slots.list_sums`, over the slots that this rank received.
        splits: int64 [6, W] on the host, see `Splits`.
        most_tokens: int64 [1] on the host, T of the rank with most.
    """

    order_N: Tensor
    perm_R: Tensor
    token_S: Tensor
    home_S: Tensor
    home_ends_T: Tensor
    source_R: Tensor
    slot_R: Tensor
    sum_R: Tensor
    sum_ends_S: Tensor
    splits: Tensor
    most_tokens: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """What operators carry."""
        return list(self)


class Splits(NamedTuple):
    """`Moves.splits` by name, for each rank: routes sent and received, slots sent and received, and where, in that
    rank's
    window, this rank's sums and this rank's rows start on their way back."""

    sent: list[int]
    received: list[int]
    slots: list[int]
    taken: list[int]
    sum_starts: list[int]
    row_starts: list[int]

    @classmethod
    def of(cls, splits: Tensor) -> Splits:
        return cls(*splits.tolist())


class Arrived(NamedTuple):
    """What a dispatch brought; `moves` are those of its engine."""

    rows_RD: Tensor
    weights_R: Tensor
    offsets_e: Tensor
    moves: Any


class Engine(Protocol):
    """The four exchanges over one kind of memory. Results are never window memory.

    Each engine has moves of its own kind, with `tensors` and `perm_R`: `Moves`, `onesided_nodes.NodeMoves` or
    `onesided_parts.PartMoves`.
    """

    size: int

    @staticmethod
    def moves(tensors: list[Tensor]) -> Any:
        """The moves that these are the `tensors` of."""

    def fake_moves(self, ids_TK: Tensor, new_size: Callable[[], Any]) -> list[Tensor]:
        """Tensors of the shapes and dtypes of a dispatch's moves; `new_size` makes a size that the routing decides."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, wire: Wire
    ) -> Pending[Arrived]:
        """Tokens to the ranks of their experts, in expert-major order."""

    def resend(self, x_TD: Tensor, weights_TK: Tensor, moves: Any, wire: Wire) -> Pending[tuple[Tensor, Tensor]]:
        """Rows_RD and weights_R of other tokens with the same routes."""

    def return_sums(
        self, rows_RD: Tensor, weights_R: Tensor | None, moves: Any, num_tokens: int, top_k: int, wire: Wire
    ) -> Pending[Tensor]:
        """y_TD, summed on the experts' ranks, then over ranks; `None` weights are ones."""

    def return_rows(self, rows_RD: Tensor, moves: Any, num_tokens: int, top_k: int, wire: Wire) -> Pending[Tensor]:
        """[T, K, D], zeros where not routed."""

    def close(self) -> None:
        """Give the windows back."""
