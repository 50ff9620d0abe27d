"""The choice of experts in plain PyTorch, on any device, with gradients to the logits.

Letters: T tokens, E experts, K chosen ones, G groups of E / G experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext.gating_top_k.rule import Gating

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def forward(logits_TE: Tensor, rule: Gating, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weights_TK, not yet scaled, in float32 (float64 stays), and ids_TK int64."""
    wide_TE = widen(logits_TE)
    if rule.kind == "sigmoid":
        return _by_sigmoid(wide_TE, rule, bias_E)
    if rule.kind == "topk_softmax":
        top_TK, ids_TK = torch.topk(logits_TE, rule.top_k, dim=-1)
        return torch.softmax(widen(top_TK), dim=-1), ids_TK
    weights_TK, ids_TK = torch.topk(torch.softmax(wide_TE, dim=-1), rule.top_k, dim=-1)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True) if rule.renormalize else weights_TK, ids_TK


def _by_sigmoid(logits_TE: Tensor, rule: Gating, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    scores_TE = logits_TE.sigmoid()
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if rule.num_groups > 1:
        choice_TE = _mask_groups(choice_TE, rule)
    ids_TK = torch.topk(choice_TE, rule.top_k, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK, ids_TK


def _mask_groups(choice_TE: Tensor, rule: Gating) -> Tensor:
    """Set the experts outside the best groups to -inf."""
    choice_TGe = choice_TE.unflatten(1, (rule.num_groups, -1))
    score_TG = choice_TGe.topk(2, dim=-1).values.sum(dim=-1)
    best = torch.topk(score_TG, rule.top_groups, dim=-1, sorted=False).indices
    keep_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, best, True)
    return choice_TGe.masked_fill(~keep_TG.unsqueeze(-1), float("-inf")).flatten(1)


def widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
