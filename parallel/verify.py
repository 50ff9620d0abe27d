"""The proof that a wrapped model is the model: loss and every gradient of one step, against one process.

Every rank builds the unwrapped model as well, runs it on the whole batch (the concatenation of all data ranks'), and
compares its own shard of every gradient. Gradients are compared, never losses after Adam steps: Adam hides a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.kernels_ext.tolerance import TOLERANCE, relative_error
from moeweave.parallel.aux_loss import balances
from moeweave.parallel.grad_norm import clip_grad_norm_, param_groups
from moeweave.parallel.hf.boxes import Slots, whole_tensor
from moeweave.parallel.loss import IGNORED_LABEL, forward_backward, loss_of, split
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.names import named_params
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.placed import slots_of_params
from moeweave.parallel.plan import Plan
from moeweave.parallel.prepare_optimizer import prepare_optimizer
from moeweave.parallel.record import record_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class ParityReport:
    """What one step of the wrapped model and of the reference had in common.

    Attributes:
        loss, reference_loss, loss_error: of the wrapped model over ranks, of the unwrapped one, relative difference.
        errors: relative error (||difference|| / ||reference||) of every parameter's gradient, by name.
        norm, reference_norm, norm_error: global gradient norm by `clip_grad_norm_`, the reference's, difference.
        tolerance: what `worst`, `loss_error` and `norm_error` must not exceed.
    """

    loss: float
    reference_loss: float
    loss_error: float
    errors: dict[str, float]
    norm: float
    reference_norm: float
    norm_error: float
    tolerance: float

    @property
    def worst_name(self) -> str:
        return max(self.errors, key=lambda name: self.errors[name])

    @property
    def worst(self) -> float:
        return self.errors[self.worst_name]

    @property
    def ok(self) -> bool:
        return bool(self.errors) and max(self.worst, self.loss_error, self.norm_error) <= self.tolerance


def gradient_parity(
    build_model: Callable[[], nn.Module],
    make_batch: Callable[[int], Batch],
    mesh: Mesh,
    plan: Plan | None = None,
    *,
    prepare: Callable[[nn.Module], None] | None = None,
    microbatches: int | None = None,
) -> ParityReport:
    """Compare one step of `parallelize(build_model(), mesh, plan)` with the unwrapped model in one process.

    A codec is left out: its rounding, far above any tolerance here, would hide a fault of the wrapping, and is bounded
    by a table of its own (SQNR floors).

    Collective. The batches of all data ranks must have equal widths (pad them), their rows are concatenated.

    Args:
        build_model: gives the same weights at every call, on every rank.
        make_batch: data rank -> keyword arguments of the model's forward.
        microbatches: of the wrapped model's step; by default 1, under pp the fewest that every schedule takes.
            A balance loss is that of each micro-batch over all data ranks, averaged, on both sides.
        prepare: called on both models before use, e.g. to switch on options.

    Returns:
        The report, equal on every rank.
    """
    plan = replace(plan or Plan(), codec="none")
    reference = build_model().to(mesh.device)
    if plan.torch_dtype is not None:
        # The reference computes in the compute dtype too. Its buffers (rotary frequencies, router biases) do not, there
        # as here.
        for param in reference.parameters():
            param.data = param.data.to(plan.torch_dtype)
    wrapped = parallelize(build_model(), mesh, plan)
    for model in (reference, wrapped):
        model.train()
        if prepare is not None:
            prepare(model)
    if plan.zero_stage is not None:
        prepare_optimizer(wrapped, torch.optim.SGD(param_groups(wrapped), lr=0.0))
    count = microbatches or (1 if mesh.sizes.pp == 1 else 2 * mesh.sizes.pp)
    batches = [concatenate([make_batch(rank)], mesh.device) for rank in range(mesh.data_size)]
    reference_loss = _reference_step(reference, batches, count, mesh)
    loss = forward_backward(wrapped, batches[mesh.data_rank], count)

    dtype = plan.torch_dtype or next(p.dtype for p in reference.parameters() if p.is_floating_point())
    wanted = {name: param.grad for name, param in reference.named_parameters()}
    errors = _gradient_errors(wrapped, wanted)
    grads = [grad for grad in wanted.values() if grad is not None]
    return ParityReport(
        loss=float(loss),
        reference_loss=float(reference_loss.detach()),
        loss_error=_difference(loss, reference_loss.detach()),
        errors=errors,
        norm=float(norm := clip_grad_norm_(wrapped, float("inf"))),
        reference_norm=float(reference_norm := _norm(grads)),
        norm_error=_difference(norm, reference_norm),
        tolerance=TOLERANCE[dtype],
    )


def _gradient_errors(wrapped: nn.Module, wanted: dict[str, Tensor | None]) -> dict[str, float]:
    """Relative error of every gradient by name, the same on every rank; infinite for one that no rank has."""
    local: dict[str, float] = {}
    placed = slots_of_params(wrapped)
    for name, param in named_params(wrapped).items():
        got = _whole_gradient(wrapped, param, placed.get(name))
        if got is not None or wanted[name] is not None:
            local[name] = _error(got, wanted[name])
    errors = _agree(local)
    missing = {name for name, grad in wanted.items() if grad is not None} - set(errors)
    return errors | dict.fromkeys(missing, float("inf"))


def _whole_gradient(model: nn.Module, param: nn.Parameter, slots: Slots | None) -> Tensor | None:
    """The gradient of the whole parameter, from whichever engine has it. A collective."""
    zero = record_of(model).zero
    if zero is not None:
        grad: Tensor | None = zero.gradient(param)
        return grad
    return None if param.grad is None else whole_tensor(param.grad, slots)


def _reference_step(model: nn.Module, batches: list[Batch], count: int, mesh: Mesh) -> Tensor:
    """Loss of the whole batch in one process, gradients in `.grad`. A balance loss is not a sum over rows: with
    micro-batches it is that of each (over all data ranks), averaged."""
    whole = concatenate(batches, mesh.device)
    if count == 1 or not balances(model, whole):
        loss = loss_of(model(**whole))
        loss.backward()
        return loss.detach()
    counted = (whole["labels"][:, 1:] != IGNORED_LABEL).sum()
    parts = [split(batch, count) for batch in batches]
    total = torch.zeros((), device=mesh.device)
    for index in range(count):
        output = model(**concatenate([part[index] for part in parts], mesh.device), num_items_in_batch=counted)
        coef = getattr(model, "router_aux_loss_coef", 0.0)
        loss = output.loss + coef * output.aux_loss * (1.0 / count - 1.0)
        loss.backward()
        total = total + loss.detach()
    return total


def _norm(grads: list[Tensor]) -> Tensor:
    """Global norm of plain gradients; a CPU sums many float32 squares badly."""
    wide = torch.float64 if grads[0].device.type == "cpu" else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad, dtype=wide) for grad in grads]))


def _difference(got: Tensor, want: Tensor) -> float:
    return abs(float(got) - float(want)) / max(abs(float(want)), 1e-30)


def _error(got: Tensor | None, want: Tensor | None) -> float:
    if got is None or want is None:
        present = got if got is not None else want
        assert present is not None
        # A gradient of zeros and none at all are the same step.
        return 0.0 if not present.any() else float("inf")
    return relative_error(got, want)


def _agree(errors: dict[str, float]) -> dict[str, float]:
    """Largest error of each parameter over ranks; ranks may hold different ones (experts in a ModuleList)."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, errors)
    names = sorted({name for each in gathered for name in each})
    return {name: max(each[name] for each in gathered if name in each) for name in names}


def concatenate(batches: list[Batch], device: torch.device) -> Batch:
    """Rows of several batches as one, on `device`; right-padded to the longest (labels with -100, the rest with 0)."""
    whole: Batch = {}
    for name, first in batches[0].items():
        if not isinstance(first, Tensor) or first.dim() == 0:
            whole[name] = first
            continue
        width = max(batch[name].shape[1] for batch in batches) if first.dim() > 1 else 0
        fill = IGNORED_LABEL if "labels" in name else 0
        rows = [
            torch.nn.functional.pad(batch[name], (0, width - batch[name].shape[1]), value=fill)
            if first.dim() == 2
            else batch[name]
            for batch in batches
        ]
        whole[name] = torch.cat(rows).to(device)
    return whole
