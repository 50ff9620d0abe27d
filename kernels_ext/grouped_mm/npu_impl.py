"""Grouped matrix product by Ascend's npu_grouped_matmul: bf16 and fp16, offsets stay on the device.

The calls are checked against the operator's schema and, emulated, against the reference; no NPU has run them.
Letters: R rows, E groups (experts), D columns in, F columns out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext import npu

name = "npu"

ONE_TENSOR = 3  # split_item: one input, one output
ROWS, SHARED = 0, 2  # group_type: which axis the groups split, the rows or the summed-over one
ENDS = 0  # group_list_type: exclusive ends of the groups


def supports(*tensors: Tensor) -> str | None:
    """Return None, or which of the operator's rules the two factors break."""
    if tensors[0].dtype not in (torch.bfloat16, torch.float16):
        return f"the operator takes bfloat16 and float16, not {tensors[0].dtype}"
    if any(0 in tensor.shape for tensor in tensors):
        return "a size is 0"
    return npu.not_on_npu(*tensors)


def forward(rows_RD: Tensor, weight_EDF: Tensor, offsets_e: Tensor) -> Tensor:
    """Same contract as `reference.forward`."""
    return _product(rows_RD, weight_EDF, offsets_e, ROWS)


def weight_grad(rows_RD: Tensor, grad_RF: Tensor, offsets_e: Tensor) -> Tensor:
    """Same contract as `reference.weight_grad`; the operator is not trusted with empty groups, which are zeroed."""
    grad_EDF = _product(rows_RD.t(), grad_RF, offsets_e, SHARED)
    empty_E = offsets_e.diff(prepend=offsets_e.new_zeros(1)) == 0
    return grad_EDF.masked_fill_(empty_E[:, None, None], 0.0)


def _product(left: Tensor, right: Tensor, offsets_e: Tensor, group_type: int) -> Tensor:
    (out,) = npu.call(
        "npu_grouped_matmul",
        x=[left],
        weight=[right],
        group_list=offsets_e.to(torch.int64),
        split_item=ONE_TENSOR,
        group_type=group_type,
        group_list_type=ENDS,
    )
    return out
