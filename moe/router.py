"""Which experts a token goes to, and with what weight.

    softmax        softmax over all experts, then the top k; weights optionally renormalised  (Mixtral, Qwen-MoE, OLMoE)
    topk_softmax   the top k logits, then softmax over these k                                (GPT-OSS)
    sigmoid        sigmoid scores; a bias that only the choice sees; optionally only experts of the best groups
                   compete; weights are the unbiased scores, optionally renormalised          (DeepSeek-V3, GLM-4)

The weights are then multiplied by `scale`. Given the same parameters each equals the routers named beside it.

Legend: T tokens, D width, E experts, K chosen ones, G groups of E / G experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.kernels_ext.gating_top_k import KINDS, Gating, gating_top_k


class Router(nn.Module):
    """Token-choice router. `router(x_TD) -> (logits_TE, weights_TK, ids_TK)`, as transformers' routers return them.

    Args:
        dim: D. num_experts: E. top_k: K.
        kind: "softmax", "topk_softmax" or "sigmoid", see the module's docstring.
        renormalize: divide the chosen weights by their sum (topk_softmax: always so).
        scale: factor on the weights.
        bias: give the logits a learned bias.
        num_groups, top_groups: sigmoid only: the experts of the `top_groups` best of `num_groups` equal groups compete;
            a group is as good as the sum of its two best biased scores.
    Attributes:
        weight [E, D], starting normal(0, 0.02); bias [E] starting at zero, if asked for.
        e_score_correction_bias: sigmoid only, float32 buffer [E], moved by `balance.bias_update` and never by a
            gradient; casts of the module leave it float32.
    Raises ValueError on a size, kind or grouping that does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        kind: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        super().__init__()
        _validate(dim, num_experts, top_k, kind, num_groups, top_groups)
        self.num_experts, self.top_k, self.kind = num_experts, top_k, kind
        self.renormalize, self.scale = renormalize, scale
        self.num_groups, self.top_groups = num_groups, top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        correction_E = torch.zeros(num_experts, dtype=torch.float32) if kind == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", correction_E)
        self.e_score_correction_bias: Tensor | None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from normal(0, 0.02); zero the bias and the correction bias."""
        nn.init.normal_(self.weight, std=0.02)
        for zero in (self.bias, self.e_score_correction_bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        x_TD: [T, D] in the parameters' dtype; T may be 0.
        Returns logits_TE (x's dtype; float32 for sigmoid, which scores in float32), weights_TK (float32) and ids_TK
        (int64); float64 stays float64.
        """
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.kind == "sigmoid":
            x_TD, weight, bias = _widen(x_TD), _widen(weight), None if bias is None else _widen(bias)
        logits_TE = nn.functional.linear(x_TD, weight, bias)
        rule = Gating(self.top_k, self.kind, self.renormalize, self.num_groups, self.top_groups)
        weights_TK, ids_TK = gating_top_k(logits_TE, rule, self.e_score_correction_bias)
        return logits_TE, weights_TK if self.scale == 1.0 else weights_TK * self.scale, ids_TK

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """What a balance loss takes as each expert's probability: softmax, or sigmoid scores divided by their sum."""
        wide_TE = _widen(logits_TE)
        if self.kind != "sigmoid":
            return torch.softmax(wide_TE, dim=-1)
        scores_TE = wide_TE.sigmoid()
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """As in nn.Module, but `.to(torch.bfloat16)` leaves the correction bias float32: its steps would round away."""
        before: Any = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after: Any = self.e_score_correction_bias
        if before is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        groups = f", groups={self.top_groups}/{self.num_groups}" if self.num_groups > 1 else ""
        return f"kind={self.kind!r}, top_k={self.top_k}, num_experts={self.num_experts}, scale={self.scale}{groups}"


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _validate(dim: int, num_experts: int, top_k: int, kind: str, num_groups: int, top_groups: int) -> None:
    for name, size in (("dim", dim), ("num_experts", num_experts), ("top_k", top_k)):
        if size < 1:
            raise ValueError(f"Router.{name} ({size}) must be at least 1. Pass a positive size.")
    if top_k > num_experts:
        raise ValueError(f"Router.top_k ({top_k}) must not exceed num_experts ({num_experts}). Lower top_k.")
    if kind not in KINDS:
        raise ValueError(f"Router.kind ({kind!r}) is unknown. Use one of: {', '.join(KINDS)}.")
    if num_groups == 1 and top_groups == 1:
        return
    if kind != "sigmoid":
        raise ValueError(f"Router.num_groups ({num_groups}) needs kind='sigmoid', not {kind!r}. Leave it at 1.")
    if num_groups < 1 or num_experts % num_groups or num_experts // num_groups < 2:
        legal = [str(g) for g in range(1, num_experts // 2 + 1) if num_experts % g == 0]
        raise ValueError(
            f"Router.num_groups ({num_groups}) must split num_experts ({num_experts}) into equal groups of at least 2. "
            f"Use one of: {', '.join(legal)}."
        )
    if not 1 <= top_groups <= num_groups or top_groups * (num_experts // num_groups) < top_k:
        raise ValueError(
            f"Router.top_groups ({top_groups}) must be at most num_groups ({num_groups}) and leave at least top_k "
            f"({top_k}) experts, {num_experts // num_groups} a group. Raise top_groups or lower top_k."
        )
