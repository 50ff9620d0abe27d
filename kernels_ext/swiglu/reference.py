"""SwiGLU in plain PyTorch, on any device: over all rows, whatever the offsets say, so that nothing is read on the host.

Letters: R rows, I columns of gate and of up.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def swiglu(gate_up_RF: Tensor, offsets_e: Tensor) -> Tensor:
    """Return silu(gate) * up of every row [R, I]; rows past the last offset give what they hold."""
    gate_RI, up_RI = gate_up_RF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_RI) * up_RI
