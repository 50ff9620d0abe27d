"""Sums of rows: each output row is a weighted sum of a few input rows, listed one after the other.

Both halves of a one-sided combine are this: an expert's rank sums the rows of a token's experts there, and the token's
rank sums what the ranks sent back. Letters: R input rows, S sums, N terms of all sums, D columns.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moeweave.kernels_ext.registry import Implementation, Op, select
from moeweave.kernels_ext.sum_rows import bag_impl, reference

__all__ = ["OP", "sum_rows"]


class _SumRows(Implementation, Protocol):
    def sum_rows(
        self, rows_RD: Tensor, terms_N: Tensor, ends_S: Tensor, weights_R: Tensor | None, out_SD: Tensor
    ) -> None: ...


OP: Op[_SumRows] = Op("sum_rows", (bag_impl, reference))


def sum_rows(
    rows_RD: Tensor,
    terms_N: Tensor,
    ends_S: Tensor,
    weights_R: Tensor | None = None,
    *,
    out_SD: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """out[s] = sum of weights[r] * rows[r] over the terms r of s, in their order, in fp32 (fp64 for fp64 rows).

    Args:
        rows_RD: any floating dtype and strides; rows that no term names are not read.
        terms_N: int64, input rows by sum.
        ends_S: int64 [S + 1], where the terms of each sum start, and N.
        weights_R: one an input row, any floating dtype; None for ones.
        out_SD: where to write, contiguous, of any floating dtype; None for a new tensor in the rows' dtype.

    Rows [1, 2, 4], terms [2, 0, 1], ends [0, 2, 2, 3] and weights [10, 1, 1]: sums [14, 0, 2].
    """
    if out_SD is None:
        out_SD = rows_RD.new_empty(ends_S.shape[0] - 1, rows_RD.shape[1])
    select(OP, rows_RD, impl=impl).sum_rows(rows_RD, terms_N, ends_S, weights_R, out_SD)
    return out_SD
