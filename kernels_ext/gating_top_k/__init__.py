"""From a router's logits to the experts of each token and their weights.

Letters: T tokens, E experts, K chosen ones.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moeweave.kernels_ext.gating_top_k import npu_impl, reference
from moeweave.kernels_ext.gating_top_k.rule import KINDS, Gating
from moeweave.kernels_ext.registry import Implementation, Op, select

__all__ = ["KINDS", "OP", "Gating", "gating_top_k"]


class _GatingTopK(Implementation, Protocol):
    def forward(self, logits_TE: Tensor, rule: Gating, bias_E: Tensor | None) -> tuple[Tensor, Tensor]: ...


OP: Op[_GatingTopK] = Op("gating_top_k", (npu_impl, reference))


def gating_top_k(
    logits_TE: Tensor, rule: Gating, bias_E: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Choose `rule.top_k` experts for each token.

    Logits [log 1, log 3, log 4], K 2, "softmax" give weights [4 / 7, 3 / 7] and ids [2, 1].

    logits_TE: [T, E], floating point; T may be 0. bias_E: sigmoid only, added to the scores for the choice alone.
    Returns weights_TK, float32 (float64 stays), and ids_TK, int64. The order of a token's experts is not defined.
    Raises ValueError on an impl that cannot run.
    """
    if torch.compiler.is_compiling():
        return reference.forward(logits_TE, rule, bias_E)
    return select(OP, logits_TE, impl=_fitting(logits_TE, rule, impl)).forward(logits_TE, rule, bias_E)


def _fitting(logits_TE: Tensor, rule: Gating, impl: str) -> str:
    """A choice that only the reference can make goes there."""
    return "reference" if impl == "auto" and npu_impl.breaks(rule, logits_TE.shape[1]) else impl
