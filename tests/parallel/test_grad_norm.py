"""One gradient norm over parameters on different meshes, against torch's on the unwrapped model; and optimizers that
take such parameters.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import hf_zoo
import plain_models
from moeweave.kernels_ext.tolerance import TOLERANCE, relative_error
from moeweave.parallel.grad_norm import clip_grad_norm_, param_groups
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.verify import concatenate
from run_ranks import RankError, run_ranks
from train_steps import whole

FP64 = TOLERANCE[torch.float64]
MESHES: list[dict[str, int]] = [
    {},
    dict(dp=2),
    dict(dp=2, ep=2),
    dict(dp=4, ep=2),
    dict(dp=4, ep=4),
    dict(dp_replicate=2, dp=2, ep=2),
]


def id_of(sizes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items()) or "one"


def norms(sizes: dict[str, int], data: str, kinds: list[str]) -> list[tuple[float, float, float, float]]:
    """(norm, torch's, worst error of a clipped gradient, norm that clipping left) for each kind and p."""
    mesh = Mesh(**sizes)
    batches = [plain_models.make_batch(rank) for rank in range(mesh.data_size)]
    found = []
    for kind in kinds:
        reference = plain_models.build(kind, dtype=torch.float64)
        model = parallelize(plain_models.build(kind, dtype=torch.float64), mesh, Plan(data=data))
        reference(**concatenate(batches, mesh.device)).backward()
        forward_backward(model, batches[mesh.data_rank])
        grads = {param: param.grad.clone() for each in (reference, model) for param in each.parameters()}
        for p in (2.0, 1.0, math.inf, 3.5):
            for param, grad in grads.items():
                param.grad = grad.clone()
            want = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01, p)
            norm = clip_grad_norm_(model, 0.01, p)
            worst = max(
                relative_error(whole(param.grad), reference.get_parameter(name).grad)
                for name, param in model.named_parameters()
            )
            found.append((float(norm), float(want), worst, float(clip_grad_norm_(model, math.inf, p))))
    return found


@pytest.mark.parametrize(
    "sizes, data",
    [
        pytest.param(sizes, data, id=f"{id_of(sizes)}-{data}", marks=pytest.mark.slow if slow else ())
        for sizes in MESHES
        for data in ("fsdp2", "ddp")
        for slow in [data == "ddp" and (not sizes or "dp_replicate" in sizes)]
    ],
)
def test_the_norm_is_torchs_on_the_unwrapped_model(sizes: dict[str, int], data: str) -> None:
    ranks = sizes.get("dp", 1) * sizes.get("dp_replicate", 1)
    found = run_ranks(ranks, norms, sizes, data, ["packed", "modulelist"])
    for rank in found:
        assert [each[0] for each in rank] == [each[0] for each in found[0]], "ranks disagree"
        for norm, want, worst, left in rank:
            assert norm == pytest.approx(want, rel=FP64)
            assert worst <= FP64
            assert left == pytest.approx(0.01, rel=1e-4)


def small_norm() -> list[bool]:
    mesh = Mesh(dp=2, ep=2)
    model = parallelize(plain_models.build("packed"), mesh)
    forward_backward(model, plain_models.make_batch(mesh.rank))
    before = [whole(param.grad).clone() for param in model.parameters()]
    norm = clip_grad_norm_(model, 1e6)
    unlimited = clip_grad_norm_(model, math.inf)
    same = all(torch.equal(whole(param.grad), grad) for param, grad in zip(model.parameters(), before, strict=True))
    return [norm.dtype == torch.float32, bool(norm == unlimited), same]


def test_gradients_below_the_limit_are_left_alone() -> None:
    for found in run_ranks(2, small_norm):
        assert all(found)


def some_frozen(kind: str) -> list[float]:
    """Only experts, or only the rest, get gradients: each norm is of what is there."""
    mesh = Mesh(dp=2, ep=2)
    found = []
    for experts_only in (True, False):
        squares = []
        reference, model = plain_models.build(kind, dtype=torch.float64), plain_models.build(kind, dtype=torch.float64)
        for each in (reference, model):
            for name, param in each.named_parameters():
                param.requires_grad_((".experts." in name) == experts_only)
        reference(**concatenate([plain_models.make_batch(rank) for rank in range(2)], mesh.device)).backward()
        squares = [float(p.grad.square().sum()) for p in reference.parameters() if p.grad is not None]
        parallelize(model, mesh)
        forward_backward(model, plain_models.make_batch(mesh.rank))
        found.append(float(clip_grad_norm_(model, 1.0)) / math.sqrt(sum(squares)))
    return found


@pytest.mark.parametrize("kind", ["packed", "modulelist"])
def test_frozen_parameters_do_not_count(kind: str) -> None:
    for found in run_ranks(2, some_frozen, kind):
        assert found == pytest.approx([1.0, 1.0], rel=FP64)


def adamw_steps(sizes: dict[str, int], data: str, fused: bool) -> list[float]:
    """Updates of two AdamW steps, beside those of the unwrapped model, and how many groups there were."""
    mesh = Mesh(**sizes)
    batches = [plain_models.make_batch(rank) for rank in range(mesh.data_size)]
    options = dict(lr=1e-2, weight_decay=0.1)
    reference = plain_models.build("stacked", dtype=torch.float64)
    model = parallelize(plain_models.build("stacked", dtype=torch.float64), mesh, Plan(data=data))
    groups = param_groups(model, **options)
    plain = torch.optim.AdamW(reference.parameters(), **options, eps=1e-3)
    sharded = torch.optim.AdamW(groups, foreach=not fused, fused=fused, eps=1e-3)
    for _ in range(2):
        reference(**concatenate(batches, mesh.device)).backward()
        forward_backward(model, batches[mesh.data_rank])
        for optimizer in (plain, sharded):
            optimizer.step()
            optimizer.zero_grad()
    worst = max(relative_error(whole(p.detach()), reference.get_parameter(n)) for n, p in model.named_parameters())
    listed = sum(len(group["params"]) for group in groups)
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in model.parameters()}
    return [worst, len(groups) - len(meshes), listed - len(list(model.parameters())), len(groups)]


@pytest.mark.parametrize(
    "sizes, data, fused",
    [
        (dict(dp=2, ep=2), "fsdp2", False),
        (dict(dp=2, ep=2), "ddp", True),
        (dict(dp=4, ep=2), "fsdp2", True),
        pytest.param(dict(dp=4, ep=2), "ddp", False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_foreach_and_fused_optimizers_take_the_groups(sizes: dict[str, int], data: str, fused: bool) -> None:
    for worst, more_groups, more_params, num_groups in run_ranks(sizes["dp"], adamw_steps, sizes, data, fused):
        assert worst <= 1e-11
        assert more_groups == more_params == 0
        assert num_groups == 2


def only_what_learns() -> list[int]:
    model = plain_models.build("packed")
    model.embed.weight.requires_grad_(False)
    parallelize(model, Mesh(dp=2, ep=2))
    groups = param_groups(model, lr=0.5)
    return [sum(len(group["params"]) for group in groups) - len(list(model.parameters())), *{g["lr"] for g in groups}]


def test_groups_hold_only_what_requires_gradients() -> None:
    assert run_ranks(2, only_what_learns) == [[-1, 0.5]] * 2


def unwrapped() -> None:
    clip_grad_norm_(plain_models.build("packed"), 1.0)


def test_an_unwrapped_model_is_refused() -> None:
    with pytest.raises(RankError, match="Model is not wrapped yet: call moeweave"):
        run_ranks(1, unwrapped, fresh=True)


# ---- bf16


def bf16_parameters(name: str) -> list[float]:
    """Relative error of the norm and of all gradients against the unwrapped model, both with bfloat16 parameters."""
    mesh = Mesh(dp=2, ep=2)
    batches = [hf_zoo.make_batch(name, rank) for rank in range(2)]
    reference, model = hf_zoo.build(name).bfloat16(), hf_zoo.build(name).bfloat16()
    reference(**concatenate(batches, mesh.device)).loss.backward()
    want = math.sqrt(sum(float(p.grad.double().square().sum()) for p in reference.parameters()))
    parallelize(model, mesh, Plan(combine="exact"))  # "prereduced" would round a third time
    forward_backward(model, batches[mesh.rank])
    total, error = 0.0, 0.0
    for key, param in model.named_parameters():
        grad, goal = whole(param.grad).double(), reference.get_parameter(key).grad.double()
        total, error = total + float(goal.square().sum()), error + float((grad - goal).square().sum())
    norm = clip_grad_norm_(model, 1.0)
    clipped = math.sqrt(sum(float(whole(param.grad).double().square().sum()) for param in model.parameters()))
    same = dist.get_world_size() > 1 and all(param.dtype == torch.bfloat16 for param in model.parameters())
    return [abs(float(norm) - want) / want, math.sqrt(error / total), clipped, float(same)]


def test_bf16_parameters() -> None:
    for norm_error, error, clipped, same in run_ranks(2, bf16_parameters, "mixtral"):
        assert same
        assert norm_error <= TOLERANCE[torch.bfloat16]
        assert error <= 2 * TOLERANCE[torch.bfloat16], "two roundings: of the unwrapped model and of the wrapped one"
        assert clipped == pytest.approx(1.0, rel=TOLERANCE[torch.bfloat16])
