"""The whole model on several micro-batches in turns: the exchange of one beside attention and experts of another.

Each micro-batch is a lane (`comm.overlap.run_lanes`). State that belongs to one pass at a time is each lane's own here:
where FSDP's modules are in their pass, what the loss of the call under way is divided by, and what a pass over shared
sequences keeps (`SequenceSharing.save`). FSDP's parameters stay gathered while lanes run, until the backward pass is
through: a lane that leaves a layer must not free the weights of one that is still in it. Backward goes over all lanes
at once, so a gradient is summed over them first and reduced once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moeweave.comm.communicator import Communicator
from moeweave.comm.overlap import LaneLocal, least_of_ranks, run_lanes
from moeweave.parallel.data import fsdp_modules, no_sync, not_last
from moeweave.parallel.hf.capture import records_are_shared
from moeweave.parallel.plan import Plan
from moeweave.parallel.record import Record

T = TypeVar("T")


def refuse_lanes(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError where several passes of `model` cannot be under way at once."""
    if plan.overlap == "microbatch" and records_are_shared(model):
        raise ValueError(
            f"Plan.overlap ('microbatch') runs several passes of {type(model).__name__} in turns, and this release of "
            "transformers records their router logits in one place. Install transformers>=5.2, or set overlap=None."
        )


def agree_on_lanes(batch: dict[str, Any], parts: int, record: Record) -> int:
    """Lanes that each of `parts` micro-batches of `batch` is run as: 1 unless every rank has rows and tokens enough.

    Collective over all ranks that exchange tokens, if the plan overlaps micro-batches.
    """
    if record.plan.overlap != "microbatch" or not record.calls:
        return 1
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    rows = min((value.shape[0] for value in tensors), default=0)
    sizes = record.mesh.sizes
    tokens = min((value.shape[:2].numel() for value in tensors), default=0) // (sizes.sp * sizes.tp)
    lanes = record.plan.microbatches
    least = least_of_ranks(
        torch.tensor([rows, tokens], device=record.mesh.device), Communicator(record.mesh.token_group).name
    )
    enough = int(least[0]) >= parts * lanes and int(least[1]) >= parts * record.plan.overlap_min_tokens
    return lanes if enough else 1


def run_passes(model: nn.Module, passes: Sequence[Callable[[], Tensor]], lanes: int, record: Record) -> Tensor:
    """Forward and backward of every pass, `lanes` of them at a time; returns the sum of their losses, detached."""
    losses: list[Tensor] = []
    delayed = no_sync if record.plan.grad_sync == "last" else not_last
    for start in range(0, len(passes), lanes):
        some = passes[start : start + lanes]
        last = start + lanes == len(passes)
        # DDP decides in the forward pass whether the backward pass reduces.
        with nullcontext() if last else delayed(model), kept_gathered(model) if lanes > 1 else nullcontext():
            found = in_lanes(model, some, record) if lanes > 1 else [some[0]()]
            functools.reduce(torch.add, found).backward()
        losses += [loss.detach() for loss in found]
    return functools.reduce(torch.add, losses)


def in_lanes(model: nn.Module, passes: Sequence[Callable[[], T]], record: Record) -> list[T]:
    """Results of the passes, run in turns."""
    local: list[LaneLocal] = [_NumItems(record)]
    local += [_FSDPPass(module) for module in fsdp_modules(model)]
    local += [] if record.sequence is None else [record.sequence]
    return run_lanes(passes, local)


@contextmanager
def kept_gathered(model: nn.Module) -> Iterator[None]:
    """FSDP's parameters stay gathered from their first use in the block until its end."""
    modules = fsdp_modules(model)
    # The outermost one keeps its parameters after forward anyway, unless it was told otherwise.
    inner = [module for module in modules if id(module) != id(model)]
    for module in inner:
        module.set_reshard_after_forward(False, recurse=False)
    for module in modules:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for module in inner:
            module.set_reshard_after_forward(True, recurse=False)
        for module in modules:
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


class _NumItems:
    """What the loss of a lane's call is divided by (`Record.num_items`)."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def save(self) -> Tensor | None:
        return self.record.num_items

    def restore(self, saved: Tensor | None) -> None:
        self.record.num_items = saved


class _FSDPPass:
    """Where one FSDP module is in its pass: without it, a lane that enters a module which another one has not left
    would count as the same call, and its gradients would never be reduced."""

    def __init__(self, module: FSDPModule) -> None:
        self.state: Any = module._get_fsdp_state()
        # torch 2.11 has one group of parameters a module.
        several = getattr(self.state, "_fsdp_param_groups", None)
        self.groups = [self.state._fsdp_param_group] if several is None else list(several)
        self.holders = [self.state, *(group for group in self.groups if group is not None)]

    def save(self) -> tuple[Any, ...]:
        return (self.state._state_ctx.iter_forward_root, *(holder._training_state for holder in self.holders))

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.state._state_ctx.iter_forward_root = saved[0]
        for holder, value in zip(self.holders, saved[1:], strict=True):
            holder._training_state = value
