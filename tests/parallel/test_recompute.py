"""Activation checkpointing: gradients are those without it, and routing is replayed, not chosen anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hf_zoo
import plain_models
from hf_zoo import ZOO
from moeweave.comm.communicator import Communicator
from moeweave.parallel.loss import forward_backward, loss_of
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.recompute import replay_routing
from moeweave.parallel.record import expert_load
from run_ranks import RankError, run_ranks
from train_steps import whole


class FickleGate(nn.Module):
    """Scores whose order changes at every call; its weights do not depend on the noise, only the choice does."""

    def __init__(self, gate: nn.Linear) -> None:
        super().__init__()
        self.gate, self.calls = gate, 0

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        logits_TE = self.gate(x_TD)
        noise_TE = torch.sin(torch.arange(logits_TE.numel()) * (2.7 + self.calls)).view_as(logits_TE)
        ids_TK = torch.topk(logits_TE + 5 * noise_TE, plain_models.TOP_K).indices
        return ids_TK, torch.softmax(logits_TE, -1).gather(1, ids_TK)


class FickleBlock(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate, self.experts = FickleGate(block.gate), block.experts

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        ids_TK, weights_TK = self.gate(x_TD)
        return self.experts(x_TD, ids_TK, weights_TK).view_as(x)


def fickle(plan: dict[str, Any], replay: bool = True) -> dict[str, Any]:
    """One step of a model whose routers never choose the same twice."""
    mesh = Mesh(dp=2, ep=2)
    model = plain_models.build("packed")
    for layer in model.layers:
        layer.moe = FickleBlock(layer.moe)
    parallelize(model, mesh, Plan(**plan))
    if not replay:
        for layer in model.layers:
            layer.forward.keywords.pop("context_fn")
    swaps = []
    swap, Communicator.swap = Communicator.swap, lambda *args: (swaps.append(1), swap(*args))[1]
    try:
        loss = model(**plain_models.make_batch(mesh.rank))
        forward_swaps = len(swaps)
        loss.backward()
    finally:
        Communicator.swap = swap
    return {
        "loss": float(loss),
        "grads": {name: whole(param.grad) for name, param in model.named_parameters()},
        "calls": [layer.moe.gate.calls for layer in model.layers],
        "swaps": (forward_swaps, len(swaps)),
        "load": {path: load.tolist() for path, load in expert_load(model).items()},
    }


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("data", ["fsdp2", "ddp"])
def test_a_router_that_would_choose_otherwise_is_held_to_its_first_choice(dispatcher: str, data: str) -> None:
    plan = dict(dispatcher=dispatcher, data=data)
    kept = run_ranks(2, fickle, plan)
    recomputed = run_ranks(2, fickle, dict(plan, recompute=True))
    for once, twice in zip(kept, recomputed, strict=True):
        assert (once["calls"], twice["calls"]) == ([1, 1], [2, 2]), "recomputation did not run"
        assert once["loss"] == twice["loss"]
        assert once["load"] == twice["load"]
        for name, grad in once["grads"].items():
            assert torch.equal(twice["grads"][name], grad), name
        if dispatcher == "alltoall":
            assert twice["swaps"] == (2, 2), "counts are exchanged once, in the forward pass"


def test_without_replay_such_a_router_cannot_be_recomputed() -> None:
    """What the test above would see if nothing were replayed: other numbers of rows."""
    with pytest.raises(RankError, match=r"Recomputed values .* have different metadata"):
        run_ranks(2, fickle, dict(recompute=True), False)


def hf_gradients(name: str, how: str) -> dict[str, Tensor]:
    mesh = Mesh(dp=2, ep=2)
    model = parallelize(hf_zoo.build(name), mesh, Plan(recompute=how == "plan"))
    if how == "by the user":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forwards: list[int] = []
    experts = next(module for path, module in model.named_modules() if path.endswith("experts"))
    experts.register_forward_pre_hook(lambda *hook: forwards.append(1))
    loss = forward_backward(model, hf_zoo.make_batch(name, mesh.rank))
    load = next(iter(expert_load(model).values()))
    grads = {key: whole(param.grad) for key, param in model.named_parameters() if param.grad is not None}
    return {**grads, "loss": loss, "load": load, "forwards": torch.tensor(len(forwards))}


@pytest.mark.parametrize("name", [n for n in ("mixtral", "deepseek_v3", "gpt_oss") if n in ZOO])
def test_hugging_face_gradients_are_the_same_bits(name: str) -> None:
    kept = run_ranks(2, hf_gradients, name, "not at all")
    for how in ("plan", "by the user"):
        for once, twice in zip(kept, run_ranks(2, hf_gradients, name, how), strict=True):
            assert (int(once.pop("forwards")), int(twice.pop("forwards"))) == (1, 2)
            once["forwards"] = torch.tensor(1)
            assert {*once} - {"forwards"} == {*twice}
            for key, grad in twice.items():
                assert torch.equal(once[key], grad), (how, key)


def interleaved() -> list[float]:
    """Two graphs at once, backward in the other order, and one of them twice, against one after the other."""
    mesh = Mesh(dp=2, ep=2)
    batches = [plain_models.make_batch(mesh.rank + 10 * step) for step in range(2)]

    def gradients(order: list[int]) -> list[Tensor]:
        model = parallelize(plain_models.build("stacked", dtype=torch.float64), mesh, Plan(recompute=True))
        if order == [0, 1, 0]:
            for step in order:
                model(**batches[step]).backward()
        else:
            losses = [loss_of(model(**batch)) for batch in batches]
            losses[0].backward(retain_graph=True)
            losses[1].backward()
            losses[0].backward()
        return [whole(param.grad) for param in model.parameters()]

    one_by_one, mixed = gradients([0, 1, 0]), gradients([])
    return [float((a - b).norm() / a.norm()) for a, b in zip(one_by_one, mixed, strict=True)]


def test_several_graphs_keep_their_own_routing() -> None:
    for errors in run_ranks(2, interleaved):
        assert max(errors) <= 1e-12


def test_top_k_is_answered_with_the_kept_indices_and_fresh_values() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]])
    record, replay = replay_routing()
    with record:
        first = torch.topk(scores, 2, dim=-1)
        across = torch.topk(scores, 1, dim=0)
    for _ in range(2):
        with replay:
            again = torch.topk(-scores, 2, dim=-1)
            across_again = torch.topk(-scores, 1, dim=0)
        assert torch.equal(again.indices, first.indices)
        assert torch.equal(again.values, -first.values)
        assert torch.equal(across_again.indices, across.indices)
        assert torch.equal(across_again.values, -across.values)


def one_rank_only() -> tuple[float, float]:
    """Without torch.distributed's other ranks, too."""
    batch = plain_models.make_batch(0)
    norms = []
    for recompute in (False, True):
        model = parallelize(plain_models.build("modulelist"), Mesh(), Plan(recompute=recompute))
        forward_backward(model, batch)
        norms.append(float(sum(p.grad.square().sum() for p in model.parameters())))
    return norms[0], norms[1]


def test_on_one_rank() -> None:
    ((without, with_recompute),) = run_ranks(1, one_rank_only)
    assert without == with_recompute > 0
    assert not dist.is_initialized()
