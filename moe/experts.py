"""The experts seam: `experts(hidden_TD, ids_TK, weights_TK) -> out_TD`, and what an expert computes on its rows.

`local_experts` is the fast path on rows that are already sorted by expert: one grouped GEMM a projection. It runs our
own `Experts` and, given their packed weights and own activation, those of Hugging Face models.

Legend: T tokens, K routes a token, D width, I hidden width of an expert, R rows sorted by expert, E experts (e: of this
rank), F columns of a projection (2I for gate and up together, I for up alone).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.kernels_ext.grouped_mm import grouped_mm
from moeweave.kernels_ext.swiglu import swiglu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}


@dataclass(frozen=True)
class ExpertWeights:
    """The packed weights of e experts and what happens between and after them.

    Attributes:
        gate_up: [e, 2I, D], or [e, D, 2I] if transposed; without a gate [e, I, D] or [e, D, I].
        down: [e, D, I], or [e, I, D] if transposed.
        gate_up_bias, down_bias: [e, F] and [e, D], or None.
        is_transposed: weights are stored [e, in, out] and not [e, out, in].
        apply_gate: rows_RF -> rows_RI, the gated activation, or the activation alone if there is no gate.
        is_swiglu: apply_gate is silu(gate) * up, gate in the first half, and the op of that name takes its place.
        post_norm: rows_RD -> rows_RD, applied to each expert's output, or None.
    """

    gate_up: Tensor
    down: Tensor
    apply_gate: Callable[[Tensor], Tensor]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    is_transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None
    is_swiglu: bool = False


def local_experts(
    weights: ExpertWeights, rows_RD: Tensor, offsets_e: Tensor, *, exact: bool = False, impl: str = "auto"
) -> Tensor:
    """Run each row through its expert: up, activation, down, post-norm.

    rows_RD: [R, D], sorted by expert, in the weights' dtype; rows past offsets_e[-1] are not read.
    offsets_e: [e] int32 on the device, the exclusive end of each expert's rows.
    exact: the caller knows that R == offsets_e[-1], which saves zeroing the tails; or, without a bias of down and a
        post-norm, that nobody reads what is past it, in the output and in its gradient: these rows are undefined then.
    impl: implementation of the grouped GEMM, see `grouped_mm`.
    Returns rows_RD [R, D]; rows past offsets_e[-1] are zero, and so is their gradient, whatever gradient comes in.
    Every weight gets a gradient, zero for an expert without rows. Raises ValueError as `grouped_mm` does.
    """
    needs_experts = weights.gate_up_bias is not None or weights.down_bias is not None
    expert_R = _expert_of_rows(offsets_e, rows_RD.shape[0]) if needs_experts else None

    def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight if weights.is_transposed else weight.transpose(-2, -1)
        out = grouped_mm(rows, weight, offsets_e, impl=impl, exact=exact)
        return out if bias is None else out.add_(_BiasOfRows.apply(bias, expert_R, offsets_e))

    rows_RF = project(rows_RD, weights.gate_up, weights.gate_up_bias)
    rows_RI = swiglu(rows_RF, offsets_e) if weights.is_swiglu else weights.apply_gate(rows_RF)
    out_RD = project(rows_RI, weights.down, weights.down_bias)
    if weights.post_norm is not None:
        out_RD = weights.post_norm(out_RD)
    if not exact and (weights.down_bias is not None or weights.post_norm is not None):
        # Both make rows past the end non-zero, and would take those rows' undefined gradient into their parameters.
        tail_R = torch.arange(out_RD.shape[0], device=out_RD.device) >= offsets_e[-1]
        out_RD = out_RD.masked_fill(tail_R.unsqueeze(1), 0.0)
    return out_RD


def _expert_of_rows(offsets_e: Tensor, num_rows: int) -> Tensor:
    """Offsets [1, 3] and 4 rows give [0, 1, 1, 1]: rows past the end count as the last expert's."""
    rows = torch.arange(num_rows, device=offsets_e.device, dtype=offsets_e.dtype)
    return torch.searchsorted(offsets_e, rows, right=True).clamp_(max=offsets_e.shape[0] - 1)


class _BiasOfRows(torch.autograd.Function):
    """bias_eF[expert_R]; the gradient is summed in row order in float32, without atomics and rows past the end."""

    @staticmethod
    def forward(ctx: Any, bias_eF: Tensor, expert_R: Tensor, offsets_e: Tensor) -> Tensor:
        ctx.save_for_backward(offsets_e)
        return bias_eF.index_select(0, expert_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (offsets_e,) = ctx.saved_tensors
        wide_RF = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        ends = nn.functional.pad(offsets_e.long(), (1, 0))
        grad_eF = torch.segment_reduce(wide_RF, "sum", offsets=ends, axis=0, unsafe=True, initial=0.0)
        return grad_eF.to(grads[0].dtype), None, None


def is_swiglu(experts: nn.Module) -> bool:
    """Whether the gate of packed experts, ours or as transformers has them, is silu(gate) * up, side by side."""
    gate = getattr(experts._apply_gate, "__func__", None)
    plain = gate is Experts._apply_gate or getattr(gate, "__name__", "") == "_default_apply_gate"
    act = getattr(experts, "act_fn", None)  # gpt-oss has none
    return plain and (act is nn.functional.silu or type(act).__name__ in ("SiLU", "SiLUActivation"))


class Experts(nn.Module):
    """Routed experts with packed weights, laid out and flagged exactly as transformers packs them.

    `parallelize` replaces `forward` and nothing else, here as on Hugging Face models. The weights start
    normal(0, 0.02), the biases at zero.

    Args:
        dim: D. hidden_dim: I. num_experts: E.
        activation: "silu", "gelu" or "relu".
        gated: act(gate) * up if True (gate_up_proj [E, 2I, D], gate first), act(up) if False (up_proj [E, I, D]).
        bias: give both projections a bias.
    Raises ValueError on a size below 1 or an unknown activation.
    """

    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if size < 1:
                raise ValueError(f"Experts.{name} ({size}) must be at least 1. Pass a positive size.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"Experts.activation ({activation!r}) is unknown. Use one of: {', '.join(ACTIVATIONS)}.")
        self.num_experts = num_experts
        self.has_gate, self.has_bias = gated, bias
        self.act_fn = ACTIVATIONS[activation]
        up, columns = ("gate_up_proj", 2 * hidden_dim) if gated else ("up_proj", hidden_dim)
        self.register_parameter(up, nn.Parameter(torch.empty(num_experts, columns, dim)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        if bias:
            self.register_parameter(f"{up}_bias", nn.Parameter(torch.empty(num_experts, columns)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, dim))
        self.dispatcher = make_dispatcher("alltoall", None, num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from normal(0, 0.02) and zero the biases."""
        for param in self.parameters(recurse=False):
            if param.dim() == 3:
                nn.init.normal_(param, std=0.02)
            else:
                nn.init.zeros_(param)

    def extra_repr(self) -> str:
        num_experts, dim, hidden_dim = self.down_proj.shape
        return f"dim={dim}, hidden_dim={hidden_dim}, num_experts={num_experts}, gated={self.has_gate}"

    def _apply_gate(self, gate_up_RF: Tensor) -> Tensor:
        gate_RI, up_RI = gate_up_RF.chunk(2, dim=-1)
        return self.act_fn(gate_RI) * up_RI

    def weights(self) -> ExpertWeights:
        """The parameters as `local_experts` takes them."""
        up = "gate_up_proj" if self.has_gate else "up_proj"
        return ExpertWeights(
            gate_up=getattr(self, up),
            down=self.down_proj,
            apply_gate=self._apply_gate if self.has_gate else self.act_fn,
            gate_up_bias=getattr(self, f"{up}_bias") if self.has_bias else None,
            down_bias=self.down_proj_bias if self.has_bias else None,
            is_swiglu=self.has_gate and is_swiglu(self),
        )

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of each token's experts on this rank alone.

        hidden_TD: [T, D] in the parameters' dtype; T may be 0. ids_TK: [T, K] int64, -1 (or >= E) is not routed.
        weights_TK: [T, K], any float dtype. Returns out_TD, accumulated in float32 in increasing k, zero for a token
        without a route.
        """
        dispatched = self.dispatcher.dispatch(hidden_TD, ids_TK, weights_TK)
        rows_RD = local_experts(self.weights(), dispatched.rows_RD, dispatched.offsets_e, exact=True)
        return self.dispatcher.combine(rows_RD, weights_TK, dispatched)
