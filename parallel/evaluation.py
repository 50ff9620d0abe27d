"""Passes without a backward: what FSDP leaves gathered after them, and what it makes in inference mode.

FSDP frees the outermost module's parameters in the backward pass. After a pass that has none `model.parameters()` would
be other tensors than those that train: an optimizer built then trains nothing, `model.zero_grad()` clears nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moeweave.parallel.data import fsdp_modules, shard_again
from moeweave.parallel.record import Record


def install_evaluation(model: nn.Module, record: Record) -> None:
    """Shard parameters again after each pass of `model` without gradients or in eval mode, but for those of `generate`,
    which does it at its end. A backward pass that comes all the same gathers them anew."""
    modules = fsdp_modules(model)
    if not modules:
        return
    made = False
    # Not by decorators, which would import Dynamo together with this module.
    make_unsharded = torch.compiler.disable(_make_unsharded, reason="FSDP gathers outside of graphs")
    free = torch.compiler.disable(shard_again, reason="FSDP frees parameters outside of graphs")

    def before(*_: Any) -> None:
        nonlocal made
        if torch.is_inference_mode_enabled() and not made:
            make_unsharded(modules)
            made = True

    def after(*_: Any) -> None:
        if not (torch.is_grad_enabled() and model.training) and not record.generating:
            free(model)

    model.register_forward_pre_hook(before, prepend=True)
    model.register_forward_hook(after)


def _make_unsharded(modules: list[Any]) -> None:
    """FSDP keeps the tensors that it gathers into: made in inference mode, they could not be trained with later."""
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            module.unshard()
            module.reshard()
