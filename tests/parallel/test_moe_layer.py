"""Our own MoELayer under a mesh: gradients of the global batch, balance losses and bias updates included."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

import moeweave as mw
from moeweave.comm.dispatchers import select
from moeweave.comm.topology import Topology
from moeweave.moe.router import Router
from run_ranks import run_ranks


class Net(nn.Module):
    """Two MoE layers between embeddings and a head; returns the loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        router: Router | str = "softmax"
        if kind == "sigmoid":
            router = Router(24, 8, 3, kind="sigmoid", num_groups=4, top_groups=2, scale=1.5)
        options = dict(shared_hidden_dim=16, shared_gate=True, aux_coef=0.1, z_coef=0.01)
        first, second = mw.MoELayer(24, 20, 8, 3, router=router, **options), mw.MoELayer(24, 20, 8, 3, z_coef=0.02)
        self.layers = nn.ModuleList([first, second])
        self.head = nn.Linear(24, 50)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")
        return loss / mw.global_tokens(labels, shifted=True)


def build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    net = Net(kind)
    for param in net.parameters():
        param.data.mul_(5)
    return net


def batch(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 50, (4, 7 + 0 * rank), generator=generator)
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


def parity(kind: str, sizes: dict, plan: dict) -> tuple[float, str]:
    mesh, plan = mw.Mesh(**sizes), mw.Plan(**plan)
    want = build(kind).train()
    whole = {name: torch.cat([batch(rank)[name] for rank in range(mesh.data_size)]) for name in batch(0)}
    # Every rank feeds the reference the whole batch, so the mean count over ranks is the whole count.
    want(**whole).backward()
    got = mw.parallelize(build(kind).train(), mesh, plan)
    mw.forward_backward(got, batch(mesh.data_rank))
    errors = {}
    for (name, param), reference in zip(got.named_parameters(), want.parameters(), strict=True):
        grad = param.grad.full_tensor() if hasattr(param.grad, "full_tensor") else param.grad
        errors[name] = float((grad - reference.grad).norm() / reference.grad.norm())
    worst = max(errors, key=errors.get)
    return errors[worst], worst


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("ranks", "sizes", "plan"),
    [
        pytest.param(2, {"dp": 2, "ep": 2}, {}, id="ep2"),
        pytest.param(2, {"dp": 2}, {"data": "ddp"}, id="ddp"),
        pytest.param(4, {"dp": 4, "ep": 2}, {"recompute": True}, id="ep2-edp2-recompute"),
    ],
)
def test_gradients_of_the_global_batch(kind, ranks, sizes, plan):
    for worst, name in run_ranks(ranks, parity, kind, sizes, plan):
        assert worst <= 1e-5, name


def biases_after_a_step(microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = mw.Mesh(dp=2, ep=2)
    model = mw.parallelize(build("sigmoid").train(), mesh)
    mw.forward_backward(model, batch(mesh.data_rank), microbatches=microbatches)
    with torch.no_grad():
        model.eval()
        model(**batch(5))
    load_E = next(iter(mw.expert_load(model).values())).clone()
    mw.update_router_bias(model, 0.5)
    first = model.layers[0].router.e_score_correction_bias.clone()
    mw.update_router_bias(model, 0.5)
    assert torch.equal(first, model.layers[0].router.e_score_correction_bias), "no load since: nothing to balance"
    return first, load_E


@pytest.mark.parametrize("microbatches", [1, 2])
def test_bias_follows_the_load_of_the_global_training_step(microbatches):
    single = build("sigmoid").train()
    whole = torch.cat([batch(0)["input_ids"], batch(1)["input_ids"]])
    single.layers[0](single.embed(whole))
    load_E = single.layers[0].load_E.double()
    want = 0.5 * torch.sign(load_E.mean() - load_E)
    assert want.unique().numel() > 1
    for bias, _ in run_ranks(2, biases_after_a_step, microbatches):
        assert torch.equal(bias.double(), want)


def loss_and_norm(microbatches: int) -> tuple[float, float]:
    mesh = mw.Mesh(dp=2, ep=2, device="cpu")
    model = mw.parallelize(build("softmax").train(), mesh)
    for layer in model.layers:
        layer.aux_coef = layer.z_coef = 0.0
    part = batch(mesh.data_rank)
    part["labels"][:2, : 3 + mesh.rank] = -100
    loss = mw.forward_backward(model, part, microbatches=microbatches)
    return float(loss), float(mw.clip_grad_norm_(model, float("inf")))


def test_micro_batches_with_unequal_labels_are_the_whole_batch_on_plain_models_too():
    whole = run_ranks(2, loss_and_norm, 1)
    for microbatches in (2, 4):
        assert run_ranks(2, loss_and_norm, microbatches) == [pytest.approx(values, rel=1e-5) for values in whole]


def dispatchers_of(path: str) -> list[str]:
    with patch.object(select, "shares_memory", lambda group: False):
        wrapped = mw.parallelize(build("softmax"), mw.Mesh(dp=2, ep=2), mw.Plan(topology=path))
    return [type(layer.experts.forward.dispatcher).__name__ for layer in wrapped.layers]


def test_auto_chooses_by_the_topology_of_the_plan(tmp_path) -> None:
    """Three routes a token over two ranks that share no memory: gathered rows are fewer, but here an all-gather is ten
    times as slow."""
    facts = dict(device="cpu", device_names=["cpu"] * 2, hosts=["host"] * 2, all_to_all_us=100.0, measured_bytes=1024)
    facts |= dict(links=[[None, "memory"]] * 2, peer_access=[[None, True]] * 2, pair_gbps=[[None, 1.0]] * 2)
    for name, gbps in (("slow", 0.1), ("fast", 1.0)):
        Topology(**facts, all_to_all_gbps=1.0, all_gather_gbps=gbps).save(tmp_path / name)
    assert run_ranks(2, dispatchers_of, str(tmp_path / "slow")) == [["AllToAllDispatcher"] * 2] * 2
    assert run_ranks(2, dispatchers_of, str(tmp_path / "fast")) == [["AllGatherDispatcher"] * 2] * 2
