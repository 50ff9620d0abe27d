"""Expanding and reducing rows by Ascend's npu_moe_init_routing_v2 and npu_moe_token_unpermute; inference.

The first sorts, copies and counts in one pass; the second gathers, multiplies and sums, deterministically. Its places
must be all different, so routes without a row get the places that are left. Checked against the operators' schemas
and, emulated, against the reference; no NPU has run them.
Letters: N tokens, K routes a token, D width, R = N * K rows, e experts here, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext import npu

name = "npu"

COUNTS = 1  # expert_tokens_num_type
AS_THEY_ARE = -1  # quant_mode
GATHER = 0  # row_idx_type: the row of each route, -1 for none


def supports(*tensors: Tensor) -> str | None:
    """Return None, or which of the operators' rules the rows break."""
    if tensors[0].dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.int8):
        return f"the operators take bfloat16, float16, float32 and int8, not {tensors[0].dtype}"
    if 0 in tensors[0].shape:
        return "a size is 0"
    return npu.not_on_npu(*tensors)


def expand(
    x_ND: Tensor, scales_N: Tensor | None, ids_NK: Tensor, experts: tuple[int, int], num_experts: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Same contract as `reference.expand`. Routes to no expert go to one more, which is never here."""
    routed_NK = (ids_NK >= 0) & (ids_NK < num_experts)
    rows_RD, place_R, counts_e, scales_R = npu.call(
        "npu_moe_init_routing_v2",
        x=x_ND,
        expert_idx=torch.where(routed_NK, ids_NK, num_experts).to(torch.int32),
        scale=scales_N,
        active_num=ids_NK.numel(),
        expert_num=num_experts + 1,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=AS_THEY_ARE,
        active_expert_range=list(experts),
        row_idx_type=GATHER,
    )
    offsets_e = counts_e.cumsum(0).to(torch.int32)
    elsewhere_R = place_R < 0
    left_R = offsets_e[-1] + elsewhere_R.cumsum(0) - 1
    place_R = torch.where(elsewhere_R, left_R, place_R.to(torch.int64))
    return rows_RD, None if scales_N is None else scales_R, place_R, offsets_e


def reduce(rows_RD: Tensor, place_R: Tensor, weights_NK: Tensor) -> Tensor:
    """Same contract as `reference.reduce`; how the operator rounds between its sums is not documented."""
    total_ND: Tensor = npu.call(
        "npu_moe_token_unpermute",
        permuted_tokens=rows_RD,
        sorted_indices=place_R.to(torch.int32),
        probs=weights_NK.float(),
    )
    return total_ND
