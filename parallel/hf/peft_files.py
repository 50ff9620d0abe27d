"""Adapters of peft in peft's own format: the adapter's tensors alone, without the model they adapt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeweave.parallel.agreement import rank, together
from moeweave.parallel.names import named_state

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` is one that peft wraps (asked without importing peft)."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


@torch.no_grad()
def write_adapters(model: Any, staged: Path) -> None:
    """Writes every adapter, the default one into `staged` itself and others into folders of their names.

    A collective: shards are gathered, and rank 0 writes. Adapters are small: it holds one whole.
    """
    from peft.utils import get_peft_model_state_dict

    for name, config in model.peft_config.items():
        with together():
            own = get_peft_model_state_dict(model, named_state(model), adapter_name=name, save_embedding_layers=False)
        tensors = {key: _whole(tensor) for key, tensor in sorted(own.items())}
        with together():
            if rank() == 0:
                _write(staged if name == "default" else staged / name, tensors, config)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def _write(folder: Path, tensors: dict[str, Tensor], config: Any) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True  # as peft saves it: a loaded adapter is frozen unless asked otherwise
    config.save_pretrained(folder)
