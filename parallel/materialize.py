"""Gives memory to a model that was built on the meta device, keeping every parameter object what it is.

Tied weights, DDP's and FSDP's own lists, hooks and optimizers all refer to the parameter objects, so these stay, and
only what is inside them is swapped for real memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.names import model_class


def on_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer has no memory yet."""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def computed_on_meta(model: nn.Module) -> list[str]:
    """Names of the meta buffers that no checkpoint holds, because the constructor computes them."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_meta
    ]


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device | str, computed: Mapping[str, Tensor]) -> None:
    """Allocates all meta parameters and buffers on `device`, uninitialised, in place; the rest moves there.

    `computed` gives the values of the buffers that `computed_on_meta` names.

    Raises CheckpointError, before anything is changed, when one of them is missing.
    """
    missing = [name for name in computed_on_meta(model) if name not in computed]
    if missing:
        raise CheckpointError(
            f"{model_class(model).__name__} was built on meta, and {len(missing)} of its buffers are neither in "
            f"checkpoints (persistent=False) nor known how to compute: {', '.join(missing[:5])}. "
            "Create these buffers on a real device (device='cpu') when building the model, or register them persistent."
        )
    wanted = computed_on_meta(model)
    kept = {param: _take_hooks(param) for param in model.parameters()}
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        # _apply and not a loop: FSDP overrides it to find its memory again.
        model._apply(lambda t: _allocate(t, device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
    for param, (attributes, hooks, after_hooks) in kept.items():
        vars(param).update(attributes)
        trained = param.requires_grad
        for hook in hooks:
            param.requires_grad_(True).register_hook(hook)
        param.requires_grad_(trained)
        for hook in after_hooks:
            param.register_post_accumulate_grad_hook(hook)
    for name in wanted:
        model.get_buffer(name).copy_(computed[name])


def _allocate(tensor: Tensor, device: torch.device | str) -> Tensor:
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device)
    # A parameter is swapped with what is returned, and cannot be swapped with itself.
    return tensor.detach().to(device)


def _take_hooks(param: nn.Parameter) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Attributes, hooks and hooks after accumulation, off the parameter: a swap of its memory would lose them."""
    hooks = list((param._backward_hooks or {}).values())
    after_hooks = list((param._post_accumulate_grad_hooks or {}).values())
    param._backward_hooks = None
    param._post_accumulate_grad_hooks = None  # type: ignore[assignment]
    return dict(vars(param)), hooks, after_hooks
