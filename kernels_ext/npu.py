"""The one door to Ascend's operators.

Every call goes through `call`, by operator name and keywords only, so that a test can check each against the
operators' published schemas and an emulator can stand in on a CPU. torch-npu registers its operators when it is
loaded, which a tensor on an NPU implies: nothing here imports it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Call(Protocol):
    """Runs the operator called `name`; returns what its schema says."""

    def __call__(self, name: str, **arguments: Any) -> Any: ...


def call(name: str, **arguments: Any) -> Any:
    """Run `torch.ops.npu.<name>(**arguments)`.

    Raises:
        RuntimeError: torch-npu is not loaded, or has no such operator.
    """
    operator = getattr(torch.ops.npu, name, None)
    if operator is None:
        raise RuntimeError(
            f"operator ({name!r}) must be one that torch-npu registers. Import torch_npu on a machine with CANN."
        )
    return operator(**arguments)


def not_on_npu(*tensors: Tensor) -> str | None:
    """The reason why an NPU implementation cannot take the tensors, None if it can."""
    device = tensors[0].device.type
    return None if device == "npu" else f"it is for npu, not {device}"
