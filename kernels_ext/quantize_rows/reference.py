"""Rows quantised in plain PyTorch, on any device: the definition that the others are compared with.

Letters: R rows, D columns, G groups of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "reference"

GROUP = 128  # columns that share a scale in kinds that end in "_group128"
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
MOST = {"int8": 127.0, "fp8": 448.0, "fp8_e5m2": 57344.0}
_TINY = torch.finfo(torch.float32).tiny


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def encode(rows_RD: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return codes [R, D] and scales float32 [R, G], amax over the row (or the group) by the code's largest value.

    Row [-2.54, 1.27] gives int8 codes [-127, 64] (63.5 rounds to even) and scale 0.02. A row of zeros gives zeros and
    the smallest normal float32, which also bounds the scales of rows below it: nothing is divided by zero. A NaN or an
    infinity gives a scale that is one too, and codes 0: all of the row (or the group) decodes to NaN.
    """
    num_rows, dim = rows_RD.shape
    code, grouped_by = kind.removesuffix("_group128"), GROUP if kind.endswith("_group128") else dim
    grouped = rows_RD.float().reshape(num_rows, dim // grouped_by, grouped_by)
    scales_RG = (grouped.abs().amax(-1) / MOST[code]).clamp(min=_TINY)
    scaled = (grouped / scales_RG[..., None]).reshape(num_rows, dim)
    scaled.clamp_(-MOST[code], MOST[code]).nan_to_num_(0.0)
    return (scaled.round_() if code == "int8" else scaled).to(CODES[code]), scales_RG


def decode(codes_RD: Tensor, scales_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes times scales in `dtype`. Codes [-127, 64] with scale 0.02 give [-2.54, 1.28]."""
    num_rows, dim = codes_RD.shape
    grouped = codes_RD.float().reshape(num_rows, scales_RG.shape[1], dim // scales_RG.shape[1])
    return (grouped * scales_RG[..., None]).reshape(num_rows, dim).to(dtype)
