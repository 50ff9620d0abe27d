"""What stands between the two products of an expert: silu(gate) * up, on rows sorted by expert.

Letters: R rows, F columns of gate and up together, I of one of them, e experts; offsets_e int32, each one's end.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moeweave.kernels_ext.registry import Implementation, Op, select
from moeweave.kernels_ext.swiglu import cuda_impl, reference

__all__ = ["OP", "swiglu"]


class _Swiglu(Implementation, Protocol):
    def swiglu(self, gate_up_RF: Tensor, offsets_e: Tensor) -> Tensor: ...


OP: Op[_Swiglu] = Op("swiglu", (cuda_impl, reference))


def swiglu(gate_up_RF: Tensor, offsets_e: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up of each row before offsets_e[-1]: gate is its first half, up its second.

    Row [0, 100, 2, 3] gives [0, 300]. With offsets [1, 2] the third row and those after it are undefined, here and in
    the gradient; nothing may read them, and `grouped_mm` does not.

    gate_up_RF: [R, F], floating point, F even; R may be 0. offsets_e: int32 [e] on its device.
    impl: "auto", "cuda" or "reference". "auto" is the reference on CPUs, in compiled code, and on GPUs until
        `cuda_impl.MEASURED`.
    Returns [R, I]. Raises ValueError on another shape or dtype, or an impl that cannot run.
    """
    if gate_up_RF.dim() != 2 or not gate_up_RF.is_floating_point() or gate_up_RF.shape[1] % 2:
        raise ValueError(
            f"gate_up ({gate_up_RF.dtype}, {tuple(gate_up_RF.shape)}) must be floating point [R, F], F even. "
            "Put gate and up side by side."
        )
    if impl == "auto" and (not cuda_impl.MEASURED or torch.compiler.is_compiling()):
        impl = "reference"
    return select(OP, gate_up_RF, impl=impl).swiglu(gate_up_RF, offsets_e)
