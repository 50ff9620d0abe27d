"""SwiGLU by a kernel that stops at the last offset, which it reads on the device; bf16 and float32.

Wins where there is room for far more rows than there are, as with fixed sizes: plain PyTorch computes all of it,
forward and backward. Compiled for GPUs and run as plain C++; no GPU has run it, so `auto` leaves it out until
MEASURED is true.
Letters: R rows, F columns of gate and up together, I of one of them, e experts.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeweave.kernels_ext import nvrtc

name = "cuda"

MEASURED = False  # the one switch: True lets `auto` take this on GPUs
THREADS, BLOCKS_A_SM = 256, 8
KERNELS = ("moeweave_swiglu", "moeweave_swiglu_backward")
DTYPES = {torch.bfloat16: 0, torch.float32: 1}
FIELDS = ("gate_up", "out", "grad", "grad_gate_up", "offsets", "rows", "units", "num_offsets")


class Params(ctypes.Structure):
    """`struct Params` of swiglu.cu."""

    _fields_ = [(field, ctypes.c_uint64) for field in FIELDS]


def supports(*tensors: Tensor) -> str | None:
    """Return None, or why the kernel cannot run on these rows."""
    gate_up_RF = tensors[0]
    if gate_up_RF.device.type != "cuda" or torch.version.cuda is None:
        return f"it runs on NVIDIA GPUs, not {gate_up_RF.device.type}"
    if gate_up_RF.dtype not in DTYPES:
        return f"it takes bfloat16 and float32, not {gate_up_RF.dtype}"
    if gate_up_RF.shape[1] * gate_up_RF.element_size() % 32:
        return f"gate and up must be multiples of 16 bytes, {gate_up_RF.shape[1]} columns are not"
    try:
        nvrtc.compiler()
    except OSError as error:
        return str(error)
    return None


def swiglu(gate_up_RF: Tensor, offsets_e: Tensor) -> Tensor:
    """Same contract as the op's: rows past offsets_e[-1] are neither read nor written, in the gradient as well."""
    out: Tensor = _Swiglu.apply(gate_up_RF, offsets_e)
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RF: Tensor, offsets_e: Tensor) -> Tensor:
        gate_up_RF = gate_up_RF.contiguous()
        ctx.save_for_backward(gate_up_RF, offsets_e)
        out_RI = gate_up_RF.new_empty(gate_up_RF.shape[0], gate_up_RF.shape[1] // 2)
        launch("moeweave_swiglu", gate_up_RF, offsets_e, out=out_RI)
        return out_RI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gate_up_RF, offsets_e = ctx.saved_tensors
        grad_gate_up_RF = torch.empty_like(gate_up_RF)
        launch(
            "moeweave_swiglu_backward", gate_up_RF, offsets_e, grad=grads[0].contiguous(), grad_gate_up=grad_gate_up_RF
        )
        return grad_gate_up_RF, None


def params_of(gate_up_RF: Tensor, offsets_e: Tensor, **tensors: Tensor) -> Params:
    """What a launch is told."""
    num_rows, width = gate_up_RF.shape
    addresses = {field: tensor.data_ptr() for field, tensor in tensors.items()}
    sizes = dict(rows=num_rows, units=width * gate_up_RF.element_size() // 32, num_offsets=offsets_e.shape[0])
    return Params(gate_up=gate_up_RF.data_ptr(), offsets=offsets_e.data_ptr(), **addresses, **sizes)


def launch(kernel: str, gate_up_RF: Tensor, offsets_e: Tensor, **tensors: Tensor) -> None:
    """Run a kernel on the current stream; its tensors are the fields of `Params` of their names."""
    params, index = params_of(gate_up_RF, offsets_e, **tensors), gate_up_RF.device.index or 0
    module = nvrtc.load(source(), "swiglu.cu", KERNELS, defines(gate_up_RF.dtype), index)
    most = torch.cuda.get_device_properties(index).multi_processor_count * BLOCKS_A_SM
    blocks = min(most, max(-(-params.rows * params.units // THREADS), 1))
    module.launch(kernel, blocks, THREADS, params)


def defines(dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """What the source is compiled for."""
    return (("MW_DTYPE", DTYPES[dtype]),)


@functools.cache
def source() -> str:
    return (Path(__file__).parent / "csrc" / "swiglu.cu").read_text(encoding="utf-8")
