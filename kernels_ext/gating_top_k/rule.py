"""How experts are chosen: the rule that every implementation follows."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("softmax", "topk_softmax", "sigmoid")


@dataclass(frozen=True)
class Gating:
    """Which experts a token goes to; sizes are checked by the router.

    Attributes:
        top_k: experts a token.
        kind: "softmax", "topk_softmax" or "sigmoid".
        renormalize: divide the chosen weights by their sum (topk_softmax: always so).
        num_groups, top_groups: sigmoid only: the experts of the best groups compete.
    """

    top_k: int
    kind: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    top_groups: int = 1
