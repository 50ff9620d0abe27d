"""Experts in low precision, for inference: rows and weights as codes, W8A8 with "int8".

    rows arrive as codes            dispatcher with coded_rows
    gate and up     scaled_grouped_mm
    SwiGLU          swiglu_quant    back to codes, in one pass
    down            scaled_grouped_mm
    rows go home    combine

Legend: T tokens, K routes a token, D width, I hidden width of an expert, R rows by expert, e experts of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.dispatch import TokenDispatcher
from moeweave.comm.dispatchers.ascend_limits import AscendOptions
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.kernels_ext.scaled_grouped_mm import quantize_weight, scaled_grouped_mm
from moeweave.kernels_ext.swiglu_quant import swiglu_quant


class QuantizedExperts(nn.Module):
    """The experts seam, `experts(hidden_TD, ids_TK, weights_TK) -> out_TD`, over codes; no gradient.

    Args:
        gate_up: [e, 2I, D], gate first, this rank's experts. down: [e, D, I].
        dispatcher: over the ranks that share the experts, with coded rows.
        kind: "int8" or "fp8", what the dispatcher sends.

    Attributes:
        gate_up, down: codes [e, D, 2I] and [e, I, D]; gate_up_scales [e, 2I] and down_scales [e, D].
    """

    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor

    def __init__(self, gate_up: Tensor, down: Tensor, dispatcher: TokenDispatcher, kind: str = "int8") -> None:
        super().__init__()
        self.dispatcher, self.kind = dispatcher, kind
        for name, weight in (("gate_up", gate_up), ("down", down)):
            codes, scales = quantize_weight(weight.detach().transpose(1, 2), kind)
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scales", scales)

    @torch.no_grad()
    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """hidden_TD [T, D], ids_TK [T, K] int64 (-1 is not routed), weights_TK [T, K] -> [T, D] in hidden's dtype."""
        arrived = self.dispatcher.dispatch(hidden_TD, ids_TK, weights_TK)
        scales_R, ends, dtype = arrived.scales_R, arrived.offsets_e, hidden_TD.dtype
        assert scales_R is not None, "the dispatcher hands over codes"
        gate_up_RF = scaled_grouped_mm(arrived.rows_RD, scales_R, self.gate_up, self.gate_up_scales, ends, dtype)
        codes_RI, scales_RG = swiglu_quant(gate_up_RF, self.kind)
        rows_RD = scaled_grouped_mm(codes_RI, scales_RG.squeeze(1), self.down, self.down_scales, ends, dtype)
        return self.dispatcher.combine(rows_RD, weights_TK, arrived)


def quantize_experts(
    experts: nn.Module,
    group: ProcessGroup | None = None,
    *,
    kind: str = "int8",
    dispatcher: str = "auto",
    top_k: int = 1,
    ascend: AscendOptions | None = None,
) -> QuantizedExperts:
    """Experts packed as transformers packs them, all of them on every rank of `group`, to this rank's part in codes.

    `layer.experts = quantize_experts(layer.experts, group)`; the weights that were are free to go.

    Args:
        experts: of this library or of transformers: gated, SiLU, without biases, [E, 2I, D] with gate first.
        group: ranks that share out the experts, None for this rank alone.
        kind: "int8" (w8a8) or "fp8".
        dispatcher, top_k, ascend: as in `make_dispatcher`.
    Raises ValueError for other experts, or what `make_dispatcher` refuses.
    """
    _check(experts)
    packed: Any = experts
    moved = make_dispatcher(
        dispatcher, group, packed.num_experts, top_k=top_k, codec=Codec.parse(kind), coded_rows=True, ascend=ascend
    )
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    per_rank = packed.num_experts // size
    here = slice(rank * per_rank, (rank + 1) * per_rank)
    return QuantizedExperts(packed.gate_up_proj[here], packed.down_proj[here], moved, kind)


def _check(experts: nn.Module) -> None:
    probe = torch.linspace(-4, 4, 17)
    activation = getattr(experts, "act_fn", torch.zeros_like)
    rules = {
        "a gate": getattr(experts, "has_gate", False),
        "act_fn as SiLU": torch.equal(activation(probe), nn.functional.silu(probe)),
        "no bias": not getattr(experts, "has_bias", False),
        "weights as [E, out, in], gate first": not getattr(experts, "is_transposed", False)
        and getattr(experts, "is_concatenated", True),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(
            f"experts ({type(experts).__name__}) must be packed gated SiLU experts to be quantised: "
            f"{', '.join(broken)} does not hold. Leave these in their dtype."
        )
