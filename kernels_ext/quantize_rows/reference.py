"""Rows quantised in plain PyTorch, on any device: the definition that the others are compared with.

Letters: R rows, D columns, G groups of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "reference"

GROUP = 128  # columns that share a scale in "fp8_group128"
INT8_MAX, FP8_MAX = 127.0, 448.0
_TINY = torch.finfo(torch.float32).tiny


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def encode(rows_RD: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return codes [R, D] and scales float32 [R, G], amax over the row (or the group) by 127 or 448.

    Row [-2.54, 1.27] gives codes [-127, 64] (63.5 rounds to even) and scale 0.02. A row of zeros gives zeros and the
    smallest normal float32, which also bounds the scales of rows below it: nothing is divided by zero.
    """
    num_rows, dim = rows_RD.shape
    width = GROUP if kind == "fp8_group128" else dim
    grouped = rows_RD.float().reshape(num_rows, dim // width, width)
    most = INT8_MAX if kind == "int8" else FP8_MAX
    scales_RG = (grouped.abs().amax(-1) / most).clamp(min=_TINY)
    scaled = (grouped / scales_RG[..., None]).clamp(-most, most).reshape(num_rows, dim)
    return (scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)), scales_RG


def decode(codes_RD: Tensor, scales_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes times scales in `dtype`. Codes [-127, 64] with scale 0.02 give [-2.54, 1.28]."""
    num_rows, dim = codes_RD.shape
    grouped = codes_RD.float().reshape(num_rows, scales_RG.shape[1], dim // scales_RG.shape[1])
    return (grouped * scales_RG[..., None]).reshape(num_rows, dim).to(dtype)
