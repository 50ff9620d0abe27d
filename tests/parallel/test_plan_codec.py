"""Models trained through a codec: near the uncoded ones, the same wherever the experts live; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_zoo
import plain_models
from moeweave.comm.codec import Codec
from moeweave.kernels_ext.tolerance import SQNR_FLOOR, TOLERANCE, relative_error, sqnr
from moeweave.parallel.grad_norm import clip_grad_norm_
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.verify import gradient_parity
from run_ranks import run_ranks
from train_steps import whole

QWEN = dict(dp=2, ep=2)
EVERYWHERE = dict(dispatch="fp8", combine="fp8", dispatch_backward="fp8", combine_backward="fp8")


def train(
    name: str, sizes: dict[str, int], codecs: list[Any], plan: dict[str, Any] | None = None, steps: int = 2
) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses of some SGD steps, and the gradients of the first, for each codec."""
    mesh, found = Mesh(**sizes), []
    for codec in codecs:
        plain = name in plain_models.BLOCKS
        model = plain_models.build(name) if plain else hf_zoo.build(name)
        model = parallelize(model, mesh, Plan(codec=codec, **(plan or {})))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses, grads = [], {}
        for _ in range(steps):
            batch = plain_models.make_batch(mesh.rank) if plain else hf_zoo.make_batch(name, mesh.rank)
            losses.append(float(forward_backward(model, batch)))
            grads = grads or {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}
            clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append((losses, grads))
    return found


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


@pytest.mark.parametrize("codec", ["fp8", "int8", EVERYWHERE], ids=str)
def test_qwen3_moe_trains_near_the_uncoded_one(codec: Any) -> None:
    for (losses, grads), (coded_losses, coded_grads) in run_ranks(2, train, "qwen3_moe", QWEN, [None, codec]):
        assert coded_losses[1] < coded_losses[0] - 0.1, "it learns"
        for got, want, limit in zip(coded_losses, losses, (1e-3, 5e-3), strict=True):
            assert 0 < abs(got - want) / want < limit
        assert grads.keys() == coded_grads.keys()
        # Half of the floor of one coding: rows are coded in two layers, and a router may choose another expert.
        assert sqnr(flat(coded_grads), flat(grads)) > SQNR_FLOOR["fp8"][0] / 2


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_results_do_not_depend_on_where_the_experts_live(dispatcher: str) -> None:
    spread = run_ranks(2, train, "packed", dict(dp=2, ep=2), [EVERYWHERE], dict(dispatcher=dispatcher))
    alone = run_ranks(2, train, "packed", dict(dp=2), [EVERYWHERE], dict(dispatcher=dispatcher))
    for ((losses, grads),), ((want_losses, want_grads),) in zip(spread, alone, strict=True):
        assert losses == pytest.approx(want_losses, rel=1e-5)
        assert relative_error(flat(grads), flat(want_grads)) < TOLERANCE[torch.float32]


def test_recomputed_activations_are_coded_to_the_same_bits() -> None:
    kept = run_ranks(2, train, "packed", dict(dp=2, ep=2), [EVERYWHERE])
    again = run_ranks(2, train, "packed", dict(dp=2, ep=2), [EVERYWHERE], dict(recompute=True))
    for ((losses, grads),), ((want_losses, want_grads),) in zip(again, kept, strict=True):
        assert losses == want_losses
        assert torch.equal(flat(grads), flat(want_grads))


def prove(codec: Any) -> bool:
    mesh = Mesh(dp=2, ep=2)
    return gradient_parity(lambda: plain_models.build("packed"), plain_models.make_batch, mesh, Plan(codec=codec)).ok


def test_the_proof_leaves_the_codec_out() -> None:
    assert all(run_ranks(2, prove, "fp8"))


def refused() -> str:
    plan = Plan(codec=Codec(dispatch="fp8", scale="group128"))
    try:
        parallelize(plain_models.build("packed"), Mesh(dp=2, ep=2), plan)
    except ValueError as error:
        return str(error)
    return ""


def test_group_scales_that_do_not_fit_the_width_are_refused_on_every_rank() -> None:
    for message in run_ranks(2, refused):
        assert message == (
            "layers.0.moe.experts: codec (dispatch=fp8 scale=group128): width (16) must be a multiple of 128 with "
            "scale='group128'. Set scale='token', or a width of 128."
        )
