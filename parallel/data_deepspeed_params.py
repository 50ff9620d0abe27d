"""Parameters as DeepSpeed can hold them: plain local tensors where the model has DTensors, and back. No deepspeed here.

An expert's parameter is read by `ExpertCall`, which takes a plain tensor for this rank's slice. A layer split over `tp`
gets its DTensors back around each forward. `state_dict` gives DTensors, so that checkpoints stay the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moeweave.parallel.seam import shadowed


@dataclass(frozen=True)
class Split:
    """How a rank's slice lies in the whole parameter."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, param: DTensor) -> Split:
        return cls(param.device_mesh, param.placements, param.shape, param.stride())

    def whole(self, local: Tensor) -> DTensor:
        """The DTensor whose slice on this rank is `local`, sharing its memory; differentiable."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def localize(model: nn.Module, experts: set[int]) -> dict[nn.Parameter, nn.Parameter]:
    """Replace every DTensor parameter of `model` by a plain one of its slice, in place; ties stay ties.

    Args:
        experts: ids of the modules inside experts, whose calls take slices as they are.

    Returns:
        Old parameter -> new one.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        splits: dict[str, Split] = {}
        for name, param in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(param, DTensor):
                continue
            splits[name] = Split.of(param)
            if param not in replaced:
                local = param.to_local().detach()
                replaced[param] = nn.Parameter(local, requires_grad=param.requires_grad)
                replaced[param].moeweave_split = splits[name]  # type: ignore[attr-defined]
            module.register_parameter(name, replaced[param])
        if splits:
            _save_as_dtensors(module, splits)
            if id(module) not in experts:
                _run_on_dtensors(module, splits)
    return replaced


def split_of(param: Tensor) -> Split | None:
    """How a parameter that `localize` made lies in the whole; None for one that ranks hold whole."""
    return getattr(param, "moeweave_split", None)


def _save_as_dtensors(module: nn.Module, splits: dict[str, Split]) -> None:
    def after(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name, split in splits.items():
            state[prefix + name] = split.whole(state[prefix + name].detach())

    module.register_state_dict_post_hook(after)


def _run_on_dtensors(module: nn.Module, splits: dict[str, Split]) -> None:
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wholes = {name: split.whole(module.get_parameter(name)) for name, split in splits.items()}
        with shadowed(module, wholes):
            return own(*args, **kwargs)

    module.forward = forward
