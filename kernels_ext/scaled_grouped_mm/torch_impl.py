"""Scaled grouped product by `torch._scaled_grouped_mm`: fp8 e4m3 on tensor cores, a scale a row, no host read.

For GPUs of compute capability 9.0, the one that torch has such a kernel for; it takes codes as they lie in wire rows.
A machine without one checks its arguments against torch's rules, on meta tensors; numbers need the GPU.
Letters: R rows, E groups (experts), D columns in, F columns out.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "torch"


def supports(*tensors: Tensor) -> str | None:
    """Return None, or which of torch's rules the codes, their scales or the weight break."""
    codes_RD, scales_R, weight_EDF = tensors
    if codes_RD.device.type != "cuda":
        return f"it is for cuda, not {codes_RD.device.type}"
    if torch.cuda.get_device_capability(codes_RD.device) != (9, 0):
        return "it is for GPUs of compute capability 9.0"
    return breaks(codes_RD, scales_R, weight_EDF)


def breaks(codes_RD: Tensor, scales_R: Tensor, weight_EDF: Tensor) -> str | None:
    """Return None, or which of the rules on dtypes, sizes and strides is broken."""
    if {codes_RD.dtype, weight_EDF.dtype} != {torch.float8_e4m3fn}:
        return f"torch takes float8_e4m3fn, not {codes_RD.dtype} with {weight_EDF.dtype}"
    if scales_R.dim() != 1:
        return "torch takes one scale a row, not one a group of columns"
    if 0 in codes_RD.shape or 0 in weight_EDF.shape:
        return "a size is 0"
    if codes_RD.stride(1) != 1 or weight_EDF.stride(1) != 1:
        return "codes must lie by row, the weight by column"
    if codes_RD.stride(0) % 16 or weight_EDF.stride(2) % 16 or codes_RD.shape[1] % 16 or weight_EDF.shape[2] % 16:
        return "columns and strides must be multiples of 16 bytes"
    return None


def forward(
    codes_RD: Tensor, scales_R: Tensor, weight_EDF: Tensor, scales_EF: Tensor, offsets_e: Tensor, dtype: torch.dtype
) -> Tensor:
    """Same contract as `reference.forward`, accumulated in float32; torch writes bfloat16."""
    out_RF: Tensor = torch._scaled_grouped_mm(
        codes_RD,
        weight_EDF,
        scales_R.contiguous(),
        scales_EF.contiguous(),
        offs=offsets_e,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return out_RF.to(dtype)
