"""What stands between the two products of a quantised expert: silu(gate) * up, quantised row by row. No gradient.

Letters: R rows, F columns of gate and up together, I of one of them, G scales of a row.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moeweave.kernels_ext.quantize_rows import FORMATS
from moeweave.kernels_ext.registry import Implementation, Op, select
from moeweave.kernels_ext.swiglu_quant import npu_impl, reference

__all__ = ["OP", "swiglu_quant"]


class _SwigluQuant(Implementation, Protocol):
    def forward(self, gate_up_RF: Tensor, kind: str) -> tuple[Tensor, Tensor]: ...


OP: Op[_SwigluQuant] = Op("swiglu_quant", (npu_impl, reference))


def swiglu_quant(gate_up_RF: Tensor, kind: str = "int8", *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise silu(gate) * up of each row: gate is its first half, up its second.

    Row [0, 100, 2, 3] has silu(gate) [0, 100], the products [0, 300], and gives int8 codes [0, 127], scale 300 / 127.

    gate_up_RF: [R, F], floating point, F even; R may be 0.
    kind: as in `quantize_rows.encode`; only "int8" has an implementation beside the reference.
    Returns codes [R, I] and scales float32 [R, G] as `quantize_rows.encode` does.
    Raises ValueError on an unknown kind, another shape or dtype, or an impl that cannot run.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(FORMATS)}. Name one of them.")
    if (
        gate_up_RF.dim() != 2
        or not gate_up_RF.is_floating_point()
        or gate_up_RF.shape[1] % 2
        or not gate_up_RF.shape[1]
    ):
        raise ValueError(
            f"gate_up ({gate_up_RF.dtype}, {tuple(gate_up_RF.shape)}) must be floating point [R, F], F even. "
            "Put gate and up side by side."
        )
    chosen = select(OP, gate_up_RF, impl="reference" if impl == "auto" and kind != "int8" else impl)
    return chosen.forward(gate_up_RF, kind)
