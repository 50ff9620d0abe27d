"""Scaled grouped product by Ascend's npu_grouped_matmul: int8 rows with a scale each, int8 weights with one a column.

The call is checked against the operator's schema and, emulated, against the reference; no NPU has run it.
Letters: R rows, E groups (experts), D columns in, F columns out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext import npu

name = "npu"

ONE_TENSOR, ROWS, ENDS = 3, 0, 0  # split_item, group_type, group_list_type: as in grouped_mm
# The operator writes bfloat16 with scales of bfloat16, float16 with scales of float32; torch's numbers of the dtypes.
OUT = {torch.bfloat16: (15, torch.bfloat16), torch.float16: (5, torch.float32)}


def supports(*tensors: Tensor) -> str | None:
    """Return None, or which of the operator's rules the codes, their scales or the weight break."""
    codes_RD, scales_R, weight_EDF = tensors
    if {codes_RD.dtype, weight_EDF.dtype} != {torch.int8}:
        return f"the operator takes int8, not {codes_RD.dtype} with {weight_EDF.dtype}"
    if scales_R.dim() != 1:
        return "the operator takes one scale a row, not one a group of columns"
    if 0 in codes_RD.shape or 0 in weight_EDF.shape:
        return "a size is 0"
    return npu.not_on_npu(*tensors)


def forward(
    codes_RD: Tensor, scales_R: Tensor, weight_EDF: Tensor, scales_EF: Tensor, offsets_e: Tensor, dtype: torch.dtype
) -> Tensor:
    """Same contract as `reference.forward`; summed in int32. A dtype but float16 is written as bfloat16 and cast."""
    written = dtype if dtype in OUT else torch.bfloat16
    number, scales = OUT[written]
    (out_RF,) = npu.call(
        "npu_grouped_matmul",
        x=[codes_RD.contiguous()],
        weight=[weight_EDF],
        scale=[scales_EF.to(scales)],
        per_token_scale=[scales_R.contiguous()],
        group_list=offsets_e.to(torch.int64),
        split_item=ONE_TENSOR,
        group_type=ROWS,
        group_list_type=ENDS,
        output_dtype=number,
    )
    return out_RF.to(dtype)
