"""Scaled grouped product by decoding both factors: any format, any scales, any device; float32 in between.

Letters: R rows, E groups (experts), D columns in, F columns out, G scales of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext.grouped_mm import grouped_mm
from moeweave.kernels_ext.quantize_rows import decode

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def forward(
    codes_RD: Tensor, scales_R: Tensor, weight_EDF: Tensor, scales_EF: Tensor, offsets_e: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return rows [R, F] in `dtype`, ``(codes * scales) @ (weight * scales)`` of each row's group, rounded once."""
    scales_RG = scales_R.unsqueeze(1) if scales_R.dim() == 1 else scales_R
    rows_RD = decode(codes_RD, scales_RG, torch.float32)
    weight = weight_EDF.float() * scales_EF.unsqueeze(1)
    return grouped_mm(rows_RD, weight, offsets_e).to(dtype)
