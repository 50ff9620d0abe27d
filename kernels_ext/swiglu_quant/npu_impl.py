"""SwiGLU and int8 quantisation in one pass by Ascend's npu_dequant_swiglu_quant, on rows that need no scaling first.

The call is checked against the operator's schema and, emulated, against the reference; no NPU has run it.
Letters: R rows, F columns of gate and up together, I of one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext import npu

name = "npu"

DYNAMIC = 1  # quant_mode: a scale a row, from its largest value


def supports(*tensors: Tensor) -> str | None:
    """Return None, or which of the operator's rules the rows break."""
    if tensors[0].dtype not in (torch.bfloat16, torch.float16):
        return f"the operator takes bfloat16 and float16, not {tensors[0].dtype}"
    if tensors[0].shape[0] == 0:
        return "a size is 0"
    return npu.not_on_npu(*tensors)


def forward(gate_up_RF: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`, for "int8"; the smallest scale is the same."""
    assert kind == "int8", "the entry picks the reference for other kinds"
    codes_RI, scales_R = npu.call(
        "npu_dequant_swiglu_quant", x=gate_up_RF.contiguous(), activate_left=True, quant_mode=DYNAMIC
    )
    return codes_RI, scales_R.unsqueeze(1).clamp(min=torch.finfo(torch.float32).tiny)
