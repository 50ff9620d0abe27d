"""`prepare_optimizer`: hands model and optimizer to the engine that the plan names."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moeweave.parallel.data import shard_again
from moeweave.parallel.placed import slots_of_replicas
from moeweave.parallel.record import Record, record_of


def prepare_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer to step with, on every engine. A collective.

    With FSDP2 and DDP it is `optimizer` itself. With `Plan(data="zero0".."zero3")` DeepSpeed's engine takes model and
    optimizer here: groups are split by kind of parameter (dense, split over tp, experts), `optimizer` must not be
    stepped any more, and learning-rate schedulers go over what is returned.

    Args:
        model: from `parallelize` or `from_pretrained`, with its weights.
        optimizer: new, over parameters of the model (`param_groups`).

    Raises:
        ValueError: an optimizer that torch cannot step over sharded parameters, or that was made over parameters which
            a pass had left gathered. With ZeRO: an optimizer that has taken steps or holds other parameters;
            parameters without memory. With replicas of experts on a CPU: a fused one.
        RuntimeError: a deepspeed that is too old, or that runs on another device.

    Example:
        >>> optimizer = mw.prepare_optimizer(model, torch.optim.AdamW(mw.param_groups(model), lr=1e-3))
    """
    record = record_of(model)
    if record.plan.zero_stage is None:
        _check(model, optimizer)
        _refuse_drift(model, optimizer, record)
        return optimizer
    from moeweave.parallel.data_deepspeed import prepare

    return prepare(model, optimizer, record)


def _refuse_drift(model: nn.Module, optimizer: torch.optim.Optimizer, record: Record) -> None:
    """torch's fused steps on a CPU round the last numbers of a tensor, too few for a vector, in another way."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if fused and record.mesh.device.type == "cpu" and slots_of_replicas(model):
        raise ValueError(
            f"{type(optimizer).__name__}(fused=True) rounds by a number's place in its tensor on a CPU, so replicas of "
            "experts (Plan.placement) would drift apart. Leave fused out."
        )


def _check(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where the optimizer would fail in its first step, or do something else than on one process."""
    shard_again(model)
    for group in optimizer.param_groups:
        params = group["params"]
        sharded = [isinstance(param, DTensor) for param in params]
        if any(_is_freed(param) for param in params):
            raise ValueError(
                f"{type(optimizer).__name__} was made while a forward pass had left parameters gathered, and would "
                "train copies of them. Make it over mw.param_groups(model)."
            )
        if any(sharded) and "Adafactor" in type(optimizer).__name__:
            raise ValueError(
                f"{type(optimizer).__name__} takes means over rows, columns and whole parameters, and does not do so "
                "over sharded ones. Use an optimizer that works element by element, such as torch.optim.AdamW."
            )
        if any(sharded) and not all(sharded) and (group.get("foreach") or group.get("fused")):
            raise ValueError(
                f"{type(optimizer).__name__}(foreach or fused) cannot have sharded and whole parameters in one group. "
                "Make it over mw.param_groups(model)."
            )


def _is_freed(param: torch.Tensor) -> bool:
    if isinstance(param, DTensor) or param.is_meta:
        return False
    return param.numel() > 0 and param.untyped_storage().size() == 0
