"""The choice of experts by Ascend's npu_moe_gating_top_k, in one pass over the logits; inference.

The operator renormalises sigmoid weights always, softmax weights never; top-k before softmax is softmax renormalised.
The call is checked against the operator's schema and, emulated, against the reference; no NPU has run it.
Letters: T tokens, E experts, K chosen ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext import npu
from moeweave.kernels_ext.gating_top_k.rule import Gating

name = "npu"

SOFTMAX, SIGMOID = 0, 1  # norm_type
BEST_TWO = 1  # group_select_mode: a group is as good as the sum of its two best
MOST_EXPERTS = 2048


def supports(*tensors: Tensor) -> str | None:
    """Return None, or why the operator cannot take the logits."""
    logits_TE = tensors[0]
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        return "it has no gradient"
    if logits_TE.dtype == torch.float64:
        return "the operator takes float32 or less"
    if logits_TE.shape[0] == 0:
        return "a size is 0"
    return npu.not_on_npu(*tensors)


def breaks(rule: Gating, num_experts: int) -> str | None:
    """Return None, or which of the operator's rules the choice breaks."""
    if rule.kind == "sigmoid" and not rule.renormalize:
        return "the operator renormalises sigmoid weights"
    in_group = num_experts // rule.num_groups
    if rule.num_groups > 1 and in_group <= 2:
        return "the operator takes groups of more than two experts"
    filled = num_experts if rule.num_groups == 1 else -(-in_group // 32) * 32 * rule.num_groups
    return None if filled <= MOST_EXPERTS else f"the operator takes {MOST_EXPERTS} experts, groups filled up to 32"


def forward(logits_TE: Tensor, rule: Gating, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    weights_TK, ids_TK, _ = npu.call(
        "npu_moe_gating_top_k",
        x=logits_TE.float(),
        k=rule.top_k,
        bias=None if bias_E is None else bias_E.float(),
        k_group=rule.top_groups,
        group_count=rule.num_groups,
        group_select_mode=BEST_TWO,
        norm_type=SIGMOID if rule.kind == "sigmoid" else SOFTMAX,
    )
    if rule.kind == "topk_softmax" or (rule.kind == "softmax" and rule.renormalize):
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, ids_TK.to(torch.int64)
