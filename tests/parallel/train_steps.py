"""A wrapped model trained beside the unwrapped one: the same SGD steps, the second on the whole batch in one process.

SGD and not Adam: Adam divides a wrong factor out of the gradient again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import hf_zoo
import plain_models
from moeweave.parallel.checkpoint_engine import whole as gathered
from moeweave.parallel.grad_norm import clip_grad_norm_, param_groups
from moeweave.parallel.hf.boxes import whole_tensor
from moeweave.parallel.loss import forward_backward, loss_of
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.placed import slots_of_params
from moeweave.parallel.plan import Plan
from moeweave.parallel.prepare_optimizer import prepare_optimizer
from moeweave.parallel.verify import concatenate


@dataclass(frozen=True)
class Steps:
    """What to train, and how.

    Attributes:
        model: a kind of plain_models.BLOCKS, or a name of hf_zoo.ZOO.
        sizes: of the mesh. plan: fields of the plan.
        rows: rows of each data rank's batch, the last one for all further ranks.
        ignored: data ranks whose labels are all ignored.
        options: of plain_models.build.
        tweak: name of a function in this module that changes a freshly built model.
    """

    model: str
    sizes: dict[str, int]
    plan: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = (2,)
    ignored: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    tweak: str = ""
    num_steps: int = 3
    max_norm: float = 0.7
    norm_type: float = 2.0

    @property
    def world(self) -> int:
        return self.sizes.get("dp", 1) * self.sizes.get("dp_replicate", 1)

    @property
    def name(self) -> str:
        sizes = "-".join(f"{axis}{size}" for axis, size in self.sizes.items())
        named = {**self.plan, **self.options}
        rest = [*(key if key == "placement" else f"{key}={value}" for key, value in named.items()), self.tweak]
        return "-".join([self.model, sizes, *filter(None, rest)])


@dataclass(frozen=True)
class Trained:
    """Of one rank: the two runs' losses and norms, worst error of the updates and whose, names of parameters."""

    losses: list[float]
    reference_losses: list[float]
    norms: list[float]
    reference_norms: list[float]
    worst: float
    worst_name: str
    names: list[str]
    reference_names: list[str]
    moved: int


def builder(steps: Steps) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if steps.model in plain_models.BLOCKS:
            model: nn.Module = plain_models.build(steps.model, **{"dtype": torch.float64, **steps.options})
        else:
            model = hf_zoo.build(steps.model, **steps.options)
        if steps.tweak:
            globals()[steps.tweak](model)
        return model

    return build


def one_rank_has_all_experts_chosen(model: nn.Module) -> None:
    """Every token goes to the first two experts, so the other ranks' experts have no row."""
    for module in model.modules():
        if hasattr(module, "forced"):
            module.forced = True


def batch_of(steps: Steps, rank: int, step: int) -> dict[str, Tensor]:
    rows = steps.rows[min(rank, len(steps.rows) - 1)]
    if steps.model in plain_models.BLOCKS:
        batch = plain_models.make_batch(rank + 10 * step, rows)
    else:
        batch = hf_zoo.make_batch(steps.model, rank + 10 * step, rows)
    if rank in steps.ignored:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    return batch


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(steps: Steps) -> Trained:
    mesh = Mesh(**steps.sizes)
    build = builder(steps)
    start = {name: param.detach().clone() for name, param in build().named_parameters()}
    reference, wrapped = build(), parallelize(build(), mesh, Plan(**steps.plan))
    plain_sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
    sgd = prepare_optimizer(wrapped, torch.optim.SGD(param_groups(wrapped, lr=0.1)))
    losses: tuple[list[float], ...] = ([], [])
    norms: tuple[list[float], ...] = ([], [])
    for step in range(steps.num_steps):
        batch = concatenate([batch_of(steps, rank, step) for rank in range(mesh.data_size)], mesh.device)
        reference_loss = loss_of(reference(**batch))
        reference_loss.backward()
        norms[1].append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), steps.max_norm, steps.norm_type)))
        losses[0].append(float(forward_backward(wrapped, batch_of(steps, mesh.data_rank, step))))
        losses[1].append(float(reference_loss.detach()))
        norms[0].append(float(clip_grad_norm_(wrapped, steps.max_norm, steps.norm_type)))
        for optimizer in (plain_sgd, sgd):
            optimizer.step()
            optimizer.zero_grad()
    errors, placed = {}, slots_of_params(wrapped)
    with gathered(wrapped):
        state = {name: whole_tensor(tensor, placed.get(name)) for name, tensor in wrapped.state_dict().items()}
    for name, _ in wrapped.named_parameters():
        want = reference.get_parameter(name).detach()
        errors[name] = error_of_update(state[name], want, start[name], steps.num_steps)
    moved = sum(bool((reference.get_parameter(name) != start[name]).any()) for name in start)
    worst_name = max(errors, key=lambda name: errors[name])
    return Trained(
        *losses, *norms, errors[worst_name], worst_name, everyones_names(wrapped), sorted(reference.state_dict()), moved
    )


def error_of_update(got: Tensor, want: Tensor, start: Tensor, num_steps: int) -> float:
    """Relative error of what was added to a parameter, without what storing the parameter rounds off at every step."""
    rounding = num_steps * torch.finfo(start.dtype).eps * float(start.norm())
    update, error = float((want - start).norm()), float((got - want).norm())
    if update == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return max(0.0, error - rounding) / update


def everyones_names(model: nn.Module) -> list[str]:
    """Names of the state dict, of all ranks together."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(model.state_dict()))
    return sorted({name for names in gathered for name in names})


def train_each(cases: list[Steps]) -> list[Trained]:
    return [train(steps) for steps in cases]


def check(found: Trained, tolerance: float) -> None:
    """Losses, norms and updates equal within `tolerance`; names untouched; something was trained, and clipped."""
    for got, want in ((found.losses, found.reference_losses), (found.norms, found.reference_norms)):
        for a, b in zip(got, want, strict=True):
            assert abs(a - b) <= tolerance * abs(b), (got, want)
    assert found.worst <= tolerance, (found.worst_name, found.worst)
    assert found.names == found.reference_names
    assert found.moved > 5
    assert found.norms[0] > 0
