"""SwiGLU and quantisation in plain PyTorch, on any device.

Letters: R rows, F columns of gate and up together, I of one of them, G scales of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext.quantize_rows import encode

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def forward(gate_up_RF: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return codes [R, I] and scales float32 [R, G] of silu(gate) * up, computed in float32."""
    gate_RI, up_RI = gate_up_RF.float().chunk(2, dim=-1)
    return encode(torch.nn.functional.silu(gate_RI) * up_RI, kind)
