"""What a ZeRO engine changes in a checkpoint: weights are saved as ever, the optimizer's partitions by the engine.

The partitions fit the same mesh only; the weights fit any.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.names import unwrap


def zero_of(model: nn.Module) -> Any:
    """The `Zero` of a model that `prepare_optimizer` gave to DeepSpeed, else None."""
    record = vars(unwrap(model)).get("_moeweave")
    return None if record is None else record.zero


def whole(model: nn.Module, *, write: bool = False) -> AbstractContextManager[None]:
    """Inside, parameters are whole on their data ranks, also at ZeRO stage 3. A collective."""
    zero = zero_of(model)
    context: AbstractContextManager[None] = nullcontext() if zero is None else zero.whole(write=write)
    return context


def check_given(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise CheckpointError where there is an engine and `optimizer` is not what `prepare_optimizer` returned."""
    zero = zero_of(model)
    if optimizer is not None and zero is not None and getattr(optimizer, "zero", None) is not zero:
        raise CheckpointError(
            f"the model's optimizer state is DeepSpeed's (zero{zero.stage}), and another optimizer was passed. Pass "
            "what mw.prepare_optimizer returned, or optimizer=None."
        )


def check_saved(model: nn.Module, saved: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError where one side's optimizer state is an engine's and the other's is not, or differs."""
    zero = zero_of(model)
    mine = {"engine": "none"} if zero is None else zero.describe()
    theirs = {"engine": "none"} if saved is None or "engine" not in saved else dict(saved)
    if saved is None and zero is not None:
        raise CheckpointError("the checkpoint was saved without an optimizer. Load it with optimizer=None.")
    for field, value in mine.items():
        if theirs.get(field) != value:
            raise CheckpointError(
                f"the checkpoint's optimizer state has {field} {theirs.get(field)}, and here it is {value}: a ZeRO "
                "engine reads its own partitions only, with the same plan and as many ranks of every axis. Load the "
                "weights alone with optimizer=None, or go on with what saved it."
            )
