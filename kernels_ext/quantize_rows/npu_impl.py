"""Rows quantised to int8 by Ascend's npu_dynamic_quant: one pass over the rows, scale = amax / 127.

The call is checked against the operator's schema; its values have not been compared on an NPU.
Letters: R rows, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext import npu

name = "npu"


def supports(*tensors: Tensor) -> str | None:
    """Return None, or which of the operator's rules the rows break."""
    if tensors[0].dtype not in (torch.bfloat16, torch.float16):
        return f"the operator takes bfloat16 and float16, not {tensors[0].dtype}"
    return npu.not_on_npu(*tensors)


def encode(rows_RD: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.encode`, for "int8"; the smallest scale is the same."""
    if kind != "int8":
        raise ValueError(f"kind ({kind!r}) must be 'int8' for impl='npu'. Use impl='reference'.")
    codes_RD, scales_R = npu.call("npu_dynamic_quant", input=rows_RD)
    return codes_RD, scales_R.unsqueeze(1).clamp(min=torch.finfo(torch.float32).tiny)
