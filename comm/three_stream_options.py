"""How the three-stream schedule shares out an exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.select import choose

FORMS = ("auto", "gathered", "routed")
COMBINES = ("exact", "prereduced")


@dataclass(frozen=True)
class ThreeStreamOptions:
    """How the exchange is shared out.

    Attributes:
        form: "gathered", "routed", or "auto", which picks as `dispatcher="auto"` picks between its two.
        push_share: part of rows and results on the push plane, 0 to 1.
        combine: "exact", a row a route comes back; "prereduced", gathered only: one a token and rank.
        codec: formats of rows, results and gradients.
        max_tokens: tokens that no rank exceeds in a pass. With it and combine="prereduced", passes without gradients
            have fixed sizes and never read the device: they can be captured in a CUDA graph. None: agreed in each pass.
    """

    form: str = "auto"
    push_share: float = 0.25
    combine: str = "exact"
    codec: Codec = field(default_factory=Codec)
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, legal in (("form", FORMS), ("combine", COMBINES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(legal)}.")
        if not 0 <= self.push_share <= 1:
            raise ValueError(f"push_share ({self.push_share}) must be from 0 to 1.")
        if self.combine == "prereduced" and self.form == "routed":
            raise ValueError("combine ('prereduced') needs gathered rows. Set form='gathered', or combine='exact'.")
        if self.max_tokens is not None and (self.max_tokens < 1 or self.combine != "prereduced"):
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be at least 1 and go with combine='prereduced'. Leave it out."
            )

    def gathered(self, top_k: int, num_ranks: int) -> bool:
        """Whether rows are gathered, for so many routes a token."""
        if self.form == "auto":
            return choose(num_ranks, top_k, self.combine)[0] == "allgather"
        return self.form == "gathered"
