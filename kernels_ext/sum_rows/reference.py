"""Sums of rows in plain PyTorch, on any device: a pass for the first term of every sum, one for the second, and so on.

Letters: R input rows, S sums, N terms of all sums, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def sum_rows(rows_RD: Tensor, terms_N: Tensor, ends_S: Tensor, weights_R: Tensor | None, out_SD: Tensor) -> None:
    """Same contract as the package's `sum_rows`."""
    wide = torch.float64 if rows_RD.dtype == torch.float64 else torch.float32
    total_SD = torch.zeros(out_SD.shape, dtype=wide, device=rows_RD.device)
    starts_S, counts_S = ends_S[:-1], ends_S.diff()
    for place in range(int(counts_S.max()) if counts_S.numel() else 0):
        sums = (counts_S > place).nonzero()[:, 0]
        row = terms_N[starts_S[sums] + place]
        weight = 1 if weights_R is None else weights_R[row].to(wide).unsqueeze(1)
        total_SD[sums] += rows_RD[row].to(wide) * weight
    out_SD.copy_(total_SD)
