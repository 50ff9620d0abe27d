"""The random number generators of this rank, as values that a checkpoint can hold."""

from __future__ import annotations

import importlib
import random
import sys
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's (if it is in use) and torch's generators, on CPU and on the accelerator in use."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "cpu": torch.get_rng_state(),
    }
    if "numpy" in sys.modules:
        name, numbers, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, torch.tensor(numbers.astype("int64")), int(position), int(has_gauss), float(cached)]
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and torch.get_device_module(device).is_initialized():
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Sets the generators to what `rng_state` returned; those that this process has not are passed over."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    torch.set_rng_state(state["cpu"].cpu())
    if "numpy" in state:
        name, numbers, position, has_gauss, cached = state["numpy"]
        importlib.import_module("numpy").random.set_state(
            (name, numbers.numpy().astype("uint32"), position, has_gauss, cached)
        )
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu())
