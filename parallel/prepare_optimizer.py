"""`prepare_optimizer`: hands model and optimizer to the engine that the plan names."""

from __future__ import annotations

import torch
from torch import nn

from moeweave.parallel.record import record_of


def prepare_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer to step with, on every engine. A collective.

    With FSDP2 and DDP it is `optimizer` itself. With `Plan(data="zero0".."zero3")` DeepSpeed's engine takes model and
    optimizer here: groups are split by kind of parameter (dense, split over tp, experts), `optimizer` must not be
    stepped any more, and learning-rate schedulers go over what is returned.

    Args:
        model: from `parallelize` or `from_pretrained`, with its weights.
        optimizer: new, over parameters of the model (`param_groups`).

    Raises:
        ValueError: an optimizer that has taken steps or holds other parameters; parameters without memory.
        RuntimeError: a deepspeed that is too old, or that runs on another device.

    Example:
        >>> optimizer = mw.prepare_optimizer(model, torch.optim.AdamW(mw.param_groups(model), lr=1e-3))
    """
    record = record_of(model)
    if record.plan.zero_stage is None:
        return optimizer
    from moeweave.parallel.data_deepspeed import prepare

    return prepare(model, optimizer, record)
