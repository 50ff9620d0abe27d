"""LoRA (peft) on wrapped models.

peft wraps a 3-D expert parameter in a module that, at every call, swaps the parameter for its updated value. That
cannot be done to a shard: instead the call goes straight to the experts, which add the update to this rank's slice.

The two low-rank factors stay whole on every rank (or sharded over the data ranks like any dense parameter): a rank
uses only the part of its own experts, so its gradient is a part too, and the sum over data ranks that data parallelism
takes anyway is the whole one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.expert import Delta, ExpertCall


def base_model(model: nn.Module) -> nn.Module:
    """The model that peft wraps, `model` itself if it does not."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def call_with_hooks(inner: nn.Module) -> None:
    """peft calls `inner.forward`, past its hooks; route that through `inner(...)`, where FSDP and the loss hook in."""
    own, inside = inner.forward, False

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return own(*args, **kwargs)
        inside = True
        try:
            return inner(*args, **kwargs)
        finally:
            inside = False

    inner.forward = forward


def install_deltas(model: nn.Module, block: MoEBlock, call: ExpertCall) -> None:
    """Let the experts of `block` add the updates of the adapters around them, and skip those adapters' own calls."""
    parts = block.path.split(".")
    for depth in range(len(parts)):
        wrapper: Any = model.get_submodule(".".join(parts[:depth]))
        name = getattr(wrapper, "parameter_name", None)
        if name is not None and hasattr(wrapper, "lora_A"):
            call.deltas[name] = _delta(wrapper)
            wrapper.forward = block.experts.__call__


def _delta(wrapper: Any) -> Delta:
    def updated(weight: Tensor, first: int, count: int) -> Tensor:
        if wrapper.disable_adapters or wrapper.merged:
            return weight
        for adapter in wrapper.active_adapters:
            if adapter not in wrapper.lora_A:
                continue
            if hasattr(wrapper, "get_delta_factors"):
                left, right, scaling = wrapper.get_delta_factors(adapter)
                here = slice(first, first + count)
                weight = torch.baddbmm(weight, left[here].to(weight.dtype), right[here].to(weight.dtype), alpha=scaling)
            else:
                weight = weight + wrapper.get_delta_weight(adapter)[first : first + count].to(weight.dtype)
        return weight

    return updated
