"""Rows of all ranks to the experts of one: `expand` copies each token to the rows of its experts here, by expert, and
`reduce` sums these rows back, weighted. Sizes follow from shapes alone, so the host never waits. No gradient.

Letters: N tokens, K routes a token, D width, R = N * K rows, e experts here, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeweave.kernels_ext.expand_rows import npu_impl, reference
from moeweave.kernels_ext.registry import Implementation, Op, select

__all__ = ["EXPAND", "REDUCE", "Expanded", "expand", "reduce"]


@dataclass(frozen=True)
class Expanded:
    """Rows sorted by expert, then token, then route.

    Attributes:
        rows_RD: those past `offsets_e[-1]` are undefined.
        scales_R: of the rows, None if tokens had none.
        place_R: int64, the row of each route; routes to other experts have the places that are left, each its own.
        offsets_e: int32, exclusive ends of the experts' rows.
    """

    rows_RD: Tensor
    scales_R: Tensor | None
    place_R: Tensor
    offsets_e: Tensor


class _Expand(Implementation, Protocol):
    def expand(
        self, x_ND: Tensor, scales_N: Tensor | None, ids_NK: Tensor, experts: tuple[int, int], num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]: ...


class _Reduce(Implementation, Protocol):
    def reduce(self, rows_RD: Tensor, place_R: Tensor, weights_NK: Tensor) -> Tensor: ...


EXPAND: Op[_Expand] = Op("expand_rows", (npu_impl, reference))
REDUCE: Op[_Reduce] = Op("expand_rows.reduce", (npu_impl, reference))


def expand(
    x_ND: Tensor,
    scales_N: Tensor | None,
    ids_NK: Tensor,
    experts: tuple[int, int],
    num_experts: int,
    *,
    impl: str = "auto",
) -> Expanded:
    """Rows of the tokens that go to the experts from `experts[0]` to before `experts[1]`.

    Tokens [7], [8], ids [[0, 1], [1, 2]], experts 1 to 2 give rows [7], [8], two undefined ones, offsets [2].

    x_ND: [N, D], floating point or int8. scales_N: float32, a number that goes with each token, or None.
    ids_NK: int64; one that is no expert (-1, or num_experts and more) is not routed.
    Raises ValueError on an impl that cannot run.
    """
    chosen = select(EXPAND, x_ND, impl=impl)
    return Expanded(*chosen.expand(x_ND, scales_N, ids_NK, experts, num_experts))


def reduce(rows_RD: Tensor, expanded: Expanded, weights_NK: Tensor, here_NK: Tensor, *, impl: str = "auto") -> Tensor:
    """Weighted sum of each token's rows, in the rows' dtype: [N, D]; zero for a token without a row here.

    rows_RD: [R, D], what became of the rows of `expanded`; those past the last may hold anything.
    weights_NK: any float dtype. here_NK: bool, the routes that have a row.
    """
    past_R = _places(rows_RD) >= expanded.offsets_e[-1]
    rows_RD = rows_RD.masked_fill(past_R[:, None], 0.0)
    weights_NK = weights_NK.masked_fill(~here_NK, 0.0)
    return select(REDUCE, rows_RD, impl=impl).reduce(rows_RD, expanded.place_R, weights_NK)


def _places(rows_RD: Tensor) -> Tensor:
    return reference.arange_like(rows_RD, rows_RD.shape[0])
