"""`torch.compile` of a wrapped model: the same loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_zoo
import plain_models
from hf_zoo import ZOO
from moeweave.kernels_ext.tolerance import TOLERANCE, relative_error
from moeweave.parallel.grad_norm import clip_grad_norm_
from moeweave.parallel.loss import loss_of
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.record import expert_load
from run_ranks import run_ranks
from train_steps import whole

# One layer is enough, and the second only takes as long again; deepseek_v3 and glm4_moe start with a dense one.
SMALL = dict(num_hidden_layers=1, first_k_dense_replace=0)


def both(name: str, plan: dict[str, Any], backend: str, steps: int = 2) -> dict[str, Any]:
    """Loss and gradients of the same batches, eager and compiled."""
    mesh = Mesh(dp=2, ep=2)

    def model_and_batch(step: int) -> tuple[Any, dict[str, Tensor]]:
        if name in plain_models.BLOCKS:
            return plain_models.build(name, num_layers=1), plain_models.make_batch(mesh.rank + 10 * step)
        return hf_zoo.build(name, **SMALL), hf_zoo.make_batch(name, mesh.rank + 10 * step)

    found = []
    for compiled in (False, True):
        model = parallelize(model_and_batch(0)[0], mesh, Plan(**plan))
        call = torch.compile(model, backend=backend) if compiled else model
        losses = []
        for step in range(steps):
            loss = loss_of(call(**model_and_batch(step)[1]))
            loss.backward()
            losses.append(float(loss))
        grads = {key: whole(param.grad) for key, param in model.named_parameters() if param.grad is not None}
        load = [each.tolist() for each in expert_load(model).values()]
        found.append((losses, grads, load, float(clip_grad_norm_(model, 1.0))))
    (losses, grads, load, norm), (compiled_losses, compiled_grads, compiled_load, compiled_norm) = found
    assert grads.keys() == compiled_grads.keys()
    return {
        "losses": (losses, compiled_losses),
        "worst": max(relative_error(compiled_grads[key], grads[key]) for key in grads),
        "load": (load, compiled_load),
        "norm": (norm, compiled_norm),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def check(found: dict[str, Any]) -> None:
    tolerance = TOLERANCE[torch.float32]
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=tolerance)
    assert found["worst"] <= tolerance
    assert found["load"][0] == found["load"][1]
    assert found["norm"][1] == pytest.approx(found["norm"][0], rel=tolerance)
    assert found["graphs"] > 0, "nothing was compiled"


PLANS = [
    pytest.param(dict(), id="default"),
    pytest.param(dict(data="ddp"), id="ddp", marks=pytest.mark.slow),
    pytest.param(dict(recompute=True), id="recompute", marks=pytest.mark.slow),
    pytest.param(dict(dispatcher="allgather", combine="prereduced"), id="prereduced", marks=pytest.mark.slow),
    pytest.param(dict(codec="fp8"), id="fp8", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_hugging_face_model(plan: dict[str, Any]) -> None:
    for found in run_ranks(2, both, "mixtral", plan, "aot_eager", timeout=280):
        check(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", list(plain_models.BLOCKS))
def test_plain_models(kind: str) -> None:
    for found in run_ranks(2, both, kind, {}, "aot_eager", timeout=900):
        check(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in hf_zoo.CORE if name in ZOO])
def test_with_inductor(name: str) -> None:
    for found in run_ranks(2, both, name, {}, "inductor", timeout=900):
        check(found)
