"""AdamW, and the learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch
from torch import nn

import moeweave as mw
from moeweave.launch.schema import OptimConfig
from moeweave.parallel.placed import slots_of_replicas


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Rate of 1-based `step`: linear warm-up to lr, then a cosine down to lr * min_lr_ratio at the last step.

    With lr=1, warmup_steps=2, min_lr_ratio=0 and 6 steps: 0.5, 1.0, 0.85, 0.5, 0.15, 0.0.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every parameter group; a tensor rate (compiled or captured steps) is filled in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the model's parameters, those of one dimension (norms, biases) without weight decay; prepared for the
    plan's engine."""
    groups = [
        {"params": params, "weight_decay": config.weight_decay if decays else 0.0}
        for group in mw.param_groups(model)
        for decays in (True, False)
        if (params := [param for param in group["params"] if (param.dim() > 1) == decays])
    ]
    fused = any(param.device.type != "cpu" for param in model.parameters()) or not slots_of_replicas(model)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)
    return mw.prepare_optimizer(model, adamw)
