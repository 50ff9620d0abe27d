"""The contract between an MoE layer and whatever moves its tokens.

A dispatcher brings each token to the ranks of its experts and the weighted results back. It keeps no state between
calls: `dispatch` returns a frozen `Dispatched`, `combine` takes it. Implementations are in `dispatchers/`.

Legend: T tokens here, K routes a token, D width, R rows here, e experts of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeweave.comm.layout import Layout
from moeweave.comm.pending import Pending


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived, ready for a grouped GEMM.

    Attributes:
        rows_RD: rows by expert, then source rank, then route. Rows past `offsets_e[-1]` are undefined.
        scales_R: float32 scales of rows that are still codes, [R], or [R, D / 128] of groups; None for decoded rows.
        weights_R: routing weights of the rows, detached, where the expert's rank reduces; None where the token's does.
        offsets_e: int32 on the device, exclusive ends of this rank's experts in `rows_RD`.
        handle: the layout; pass it to another `dispatch` of tokens with the same ids to skip the exchange of counts.
    """

    rows_RD: Tensor
    scales_R: Tensor | None
    weights_R: Tensor | None
    offsets_e: Tensor
    handle: Layout


class TokenDispatcher(Protocol):
    """Moves tokens to their experts and back, gradients included. Every rank of the group calls in the same order."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        """Send each token to the ranks of its experts.

        Args:
            x_TD: tokens of this rank; T may differ between ranks and may be 0.
            ids_TK: int64 expert ids over the whole group; -1 is not routed.
            weights_TK: routing weights, any float dtype.
            handle: layout of an earlier dispatch with the same ids.
        """

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """y_TD[t] = sum_k weights[t, k] * row(t, k), in the rows' dtype, zeros for tokens without a route.

        `weights_TK` are those that `dispatched` was made with: where the expert's rank reduces, it uses its copies.
        """

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        """`dispatch`, returning once the exchange is posted."""

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        """`combine`, returning once the exchange is posted."""
