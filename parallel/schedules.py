"""The pipeline schedules of torch.distributed.pipelining that a plan can name, and what each asks of a batch.

Stages lie on ranks in a loop (stage s on rank s % pp) or, for dualpipev, in a V (rank r has stages r and 2 pp - 1 - r).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble", "dualpipev")
_CLASSES = {
    "1f1b": "Schedule1F1B",
    "gpipe": "ScheduleGPipe",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


@dataclass(frozen=True)
class Layout:
    """Which stages a rank has: `schedule` on `pp` ranks."""

    schedule: str
    pp: int

    @property
    def num_stages(self) -> int:
        return self.pp * (1 if self.schedule in ("1f1b", "gpipe") else 2)

    def stages_of(self, rank: int) -> list[int]:
        """Stages of the pp coordinate `rank`, in order."""
        if self.schedule == "dualpipev":
            return [rank, self.num_stages - 1 - rank]
        return list(range(rank, self.num_stages, self.pp))

    def rank_of(self, stage: int) -> int:
        """The pp coordinate that has `stage`."""
        return next(rank for rank in range(self.pp) if stage in self.stages_of(rank))

    def check_microbatches(self, count: int) -> None:
        """Raise ValueError for a number of micro-batches that the schedule cannot run."""
        least = {"1f1b": self.pp, "dualpipev": self.num_stages}.get(self.schedule, 1)
        if count < least:
            raise ValueError(
                f"microbatches ({count}) must be at least {least} for Plan(schedule={self.schedule!r}) with "
                f"pp={self.pp}. Pass forward_backward(..., microbatches={least}) or more."
            )
        rounds = max(1, count // self.pp)
        if self.schedule in ("interleaved", "zero_bubble") and count % rounds:
            raise ValueError(
                f"microbatches ({count}) must be a multiple of microbatches // pp ({rounds}) for "
                f"Plan(schedule={self.schedule!r}) with pp={self.pp}. Use a multiple of pp."
            )


def make_schedule(layout: Layout, stages: list[PipelineStage], microbatches: int) -> Callable[..., object]:
    """The `step` of torch's schedule over this rank's stages; the last stage's output is the loss, not scaled again."""
    from torch.distributed import pipelining  # imports Dynamo, which only pp needs

    kind = getattr(pipelining.schedules, _CLASSES[layout.schedule])
    given = stages[0] if layout.num_stages == layout.pp else stages
    schedule = kind(given, microbatches, loss_fn=lambda output, target: output.sum(), scale_grads=False)
    step: Callable[..., object] = schedule.step
    return step


def weight_gradients() -> Callable[[], Callable[..., None]] | None:
    """How a stage computes its weights' gradients: None for apart from its inputs', as zero_bubble and dualpipev do,
    where torch can; else together with them, and nothing is left to do in their place in the schedule."""
    return None if _edges_have_gradients() else lambda: _nothing


def _nothing(*_: Any) -> None:
    return None


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@functools.cache
def _edges_have_gradients() -> bool:
    """Whether a backward pass can start inside a graph at a Python function (dispatch is one): not in torch 2.11."""
    x = torch.ones(1, requires_grad=True)
    try:
        torch.autograd.grad(GradientEdge(_Twice.apply(x).grad_fn, 0), x, torch.ones(1))
    except RuntimeError:
        return False
    return True
