"""How the three-stream schedule shares out an exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.select import choose
from moeweave.comm.nodes import Nodes

FORMS = ("auto", "gathered", "routed", "hierarchical")
COMBINES = ("exact", "prereduced")
PLANES = ("auto", "windows", "collectives")
FORM_OF = {"allgather": "gathered", "alltoall": "routed", "hierarchical": "hierarchical"}  # of a dispatcher's choice


@dataclass(frozen=True)
class ThreeStreamOptions:
    """How the exchange is shared out.

    Attributes:
        form: "gathered", "routed", "hierarchical", or "auto", which picks as `dispatcher="auto"` does.
        push_share: part of rows and results on the push plane, 0 to 1; gathered and routed.
        combine: "exact", a row a route comes back; "prereduced", one a token and rank; a routed exchange has only the
            first, a hierarchical one only the second.
        codec: formats of rows, results and gradients.
        max_tokens: tokens that no rank exceeds in a pass; goes with combine="prereduced". Gathered passes without
            gradients then have fixed sizes and never read the device: they can be captured in a CUDA graph. None:
            agreed in each pass.
        num_parts: hierarchical: parts that rows cross the network in, so that one spreads inside the node while the
            next crosses. 0: all cross before any spreads.
        planes: what carries gathered rows. "windows": writes into the peers' memory, in sizes that all ranks know;
            between GPUs only in fixed sizes (`max_tokens`), other passes take collectives. "collectives". "auto":
            windows where CPU ranks share memory; between GPUs collectives, until windows are measured there.
        num_sms: multiprocessors that the push plane may take between GPUs over windows; 0: all.
    """

    form: str = "auto"
    push_share: float = 0.25
    combine: str = "exact"
    codec: Codec = field(default_factory=Codec)
    max_tokens: int | None = None
    num_parts: int = 2
    planes: str = "auto"
    num_sms: int = 0

    def __post_init__(self) -> None:
        for name, legal in (("form", FORMS), ("combine", COMBINES), ("planes", PLANES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(legal)}.")
        if not 0 <= self.push_share <= 1:
            raise ValueError(f"push_share ({self.push_share}) must be from 0 to 1.")
        if self.combine == "prereduced" and self.form == "routed":
            raise ValueError("combine ('prereduced') needs gathered rows. Set form='gathered', or combine='exact'.")
        if self.combine == "exact" and self.form == "hierarchical":
            raise ValueError("combine ('exact') has no form='hierarchical'. Set combine='prereduced' or form='routed'.")
        if self.num_parts < 0:
            raise ValueError(f"num_parts ({self.num_parts}) must be at least 0. Set 0 to send all rows at once.")
        if self.num_sms < 0:
            raise ValueError(f"num_sms ({self.num_sms}) must be at least 0. Set 0 for all multiprocessors.")
        if self.planes == "windows" and self.form in ("routed", "hierarchical"):
            raise ValueError("planes ('windows') carry gathered rows. Set form='gathered', or leave out planes.")
        if self.max_tokens is not None and (self.max_tokens < 1 or self.combine != "prereduced"):
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be at least 1 and go with combine='prereduced'. Leave it out."
            )

    def form_for(self, top_k: int, num_ranks: int, nodes: Nodes | None = None) -> str:
        """The form for so many routes a token, over ranks that lie on these nodes (None: they are not told)."""
        if self.form != "auto":
            return self.form
        return FORM_OF[choose(num_ranks, top_k, self.combine, nodes=nodes)[0]]
