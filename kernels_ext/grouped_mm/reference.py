"""Grouped matrix product as a plain loop over groups: any dtype, any stride, any device (one host read of the offsets).

The baseline of the others. Wins against them nowhere, except that it always runs (float64, odd strides).
Letters: R rows, E groups (experts), D columns in, F columns out.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def forward(rows_RD: Tensor, weight_EDF: Tensor, offsets_e: Tensor) -> Tensor:
    """Return rows_RF, ``rows_RD[r] @ weight_EDF[e]`` for row r of group e; rows past the last offset are undefined.

    Rows [1], [2], [3], [4], weights [[10]], [[100]], offsets [1, 3] give [10], [200], [300], undefined.
    """
    out_RF = rows_RD.new_empty(rows_RD.shape[0], weight_EDF.shape[2])
    start = 0
    for group, end in enumerate(offsets_e.tolist()):
        if end > start:
            torch.mm(rows_RD[start:end], weight_EDF[group], out=out_RF[start:end])
        start = end
    return out_RF


def weight_grad(rows_RD: Tensor, grad_RF: Tensor, offsets_e: Tensor) -> Tensor:
    """Return grad_EDF with ``grad_EDF[e] = rows_e.T @ grad_e``, contiguous; zeros for a group without rows.

    Rows [1], [2], [3], gradients [1], [1], [1], offsets [1, 3] give [[1]], [[5]].
    """
    grad_EDF = rows_RD.new_empty(len(offsets_e), rows_RD.shape[1], grad_RF.shape[1])
    start = 0
    for group, end in enumerate(offsets_e.tolist()):
        if end > start:
            torch.mm(rows_RD[start:end].t(), grad_RF[start:end], out=grad_EDF[group])
        else:
            grad_EDF[group].zero_()
        start = end
    return grad_EDF
