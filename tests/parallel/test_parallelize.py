"""A wrapped model is the model: SGD steps with clipping beside the unwrapped one, over meshes, engines and kinds of
experts; odd batches; and what `parallelize` refuses.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plain_models
from hf_zoo import ZOO
from moeweave.kernels_ext.tolerance import TOLERANCE
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.record import expert_load, record_of
from run_ranks import RankError, run_ranks
from train_steps import Steps, Trained, check, train, train_each

EXACT = TOLERANCE[torch.float64]  # plain models run in float64
FP32 = TOLERANCE[torch.float32]
KINDS = list(plain_models.BLOCKS)
ENGINES = ["fsdp2", "ddp"]
MESHES: list[dict[str, int]] = [
    dict(dp=2),
    dict(dp=2, ep=2),
    dict(dp_replicate=2),
    dict(dp=4, ep=2),
    dict(dp=4, ep=4),
    dict(dp_replicate=2, dp=2, ep=2),
    dict(dp_replicate=2, dp=2),
]


QUICK = [(dict(dp=2, ep=2), "fsdp2"), (dict(dp=2, ep=2), "ddp"), (dict(dp=4, ep=2), "fsdp2")]


def id_of(sizes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


def ranks_of(sizes: dict[str, int]) -> int:
    return sizes.get("dp", 1) * sizes.get("dp_replicate", 1)


def everywhere(*more: tuple[dict[str, int], str]) -> list[Any]:
    """Every mesh and engine; the slow ones but for QUICK and `more`."""
    return [
        pytest.param(sizes, data, id=f"{id_of(sizes)}-{data}", marks=() if quick else pytest.mark.slow)
        for sizes in MESHES
        for data in ENGINES
        for quick in [(sizes, data) in (*QUICK, *more)]
    ]


@pytest.mark.parametrize("sizes, data", everywhere((dict(dp_replicate=2, dp=2, ep=2), "fsdp2")))
def test_sgd_steps_of_every_kind_of_experts(sizes: dict[str, int], data: str) -> None:
    cases = [Steps(kind, sizes, dict(data=data)) for kind in KINDS]
    for found in run_ranks(ranks_of(sizes), train_each, cases):
        for steps, each in zip(cases, found, strict=True):
            check(each, EXACT)
            assert max(each.norms) > steps.max_norm, "nothing was clipped"


@pytest.mark.parametrize("data", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_models_without_a_list_of_layers(data: str) -> None:
    cases = [Steps(kind, dict(dp=2, ep=2), dict(data=data), options=dict(flat=True), num_steps=2) for kind in KINDS]
    for found in run_ranks(2, train_each, cases):
        for each in found:
            check(each, EXACT)


@pytest.mark.parametrize("sizes, data", everywhere())
def test_sgd_steps_of_a_hugging_face_model(sizes: dict[str, int], data: str) -> None:
    pytest.importorskip("transformers")
    for found in run_ranks(ranks_of(sizes), train, Steps("mixtral", sizes, dict(data=data))):
        check(found, FP32)


def marked(quick: list[Steps], slow: list[Steps]) -> list[Any]:
    quick_ones = [pytest.param(steps, id=steps.name) for steps in quick]
    return quick_ones + [pytest.param(steps, id=steps.name, marks=pytest.mark.slow) for steps in slow]


ODD = [
    Steps("stacked", dict(dp=2, ep=2), rows=(1, 4)),
    Steps("packed", dict(dp=2, ep=2), rows=(3, 1), ignored=(1,)),
    Steps("packed", dict(dp=2, ep=2), ignored=(0,)),
    *(Steps(kind, dict(dp=2, ep=2), tweak="one_rank_has_all_experts_chosen", num_steps=2) for kind in KINDS),
    Steps("modulelist", dict(dp=2, ep=2), dict(dispatcher="alltoall")),
    Steps("packed", dict(dp=2, ep=2), dict(dispatcher="allgather")),
    Steps("packed", dict(dp=2, ep=2), dict(dispatcher="allgather", combine="prereduced")),
    Steps("packed", dict(dp=2, ep=2), dict(recompute=True)),
    Steps("stacked", dict(dp=2, ep=2), dict(recompute=True), options=dict(flat=True)),
    Steps("registered", dict(dp=2, ep=2), dict(data="ddp", recompute=True)),
]
ODD_AND_SLOW = [
    *(Steps(kind, dict(dp=2, ep=2), dict(data="ddp"), tweak="one_rank_has_all_experts_chosen") for kind in KINDS),
    Steps("modulelist", dict(dp=4, ep=4), tweak="one_rank_has_all_experts_chosen"),
    Steps("stacked", dict(dp=4, ep=2), tweak="one_rank_has_all_experts_chosen"),
    Steps("packed", dict(dp=4, ep=2), rows=(1, 4, 2, 3), ignored=(2,)),
    Steps("registered", dict(dp_replicate=2, dp=2, ep=2), dict(recompute=True), rows=(2, 1)),
]


@pytest.mark.parametrize("steps", marked(ODD, ODD_AND_SLOW))
def test_odd_batches_and_other_plans(steps: Steps) -> None:
    for found in run_ranks(steps.world, train, steps):
        check(found, EXACT)


HF_ODD = [Steps("mixtral", dict(dp=2, ep=2), rows=(1, 3), ignored=(1,), num_steps=2)]
HF_ODD_AND_SLOW = [
    Steps("gpt_oss", dict(dp=4, ep=2), rows=(1, 2), ignored=(3,)),
    Steps("deepseek_v3", dict(dp_replicate=2, dp=2, ep=2), dict(data="ddp")),
    Steps("muse_spark", dict(dp=4, ep=2), num_steps=1),
]


@pytest.mark.parametrize("steps", [param for param in marked(HF_ODD, HF_ODD_AND_SLOW) if param.values[0].model in ZOO])
def test_odd_batches_of_hugging_face_models(steps: Steps) -> None:
    for found in run_ranks(steps.world, train, steps):
        check(found, FP32)


# ---- capacity


def with_capacity(kind: str, sizes: dict[str, int], plan: dict[str, Any]) -> dict[str, Any]:
    mesh = Mesh(**sizes)
    model = parallelize(plain_models.build(kind, dtype=torch.float64), mesh, Plan(**plan))
    batch = plain_models.make_batch(mesh.data_rank)
    loss = model(**batch)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    full = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items() if g is not None}
    calls = record_of(model).calls
    return {
        "loss": float(loss),
        "grads": {name: grad for name, grad in full.items() if kind != "modulelist" or "mlps" not in name},
        "load": [call.load_E.tolist() for call in calls],
        "kept": [call.kept_E.tolist() for call in calls],
    }


@pytest.mark.parametrize("drop", ["probability", "position"])
def test_capacity_is_of_each_ranks_tokens_wherever_the_experts_are(drop: str) -> None:
    plan = dict(capacity=1.0, drop=drop)
    tokens, experts, top_k = 18, plain_models.NUM_EXPERTS, plain_models.TOP_K
    limit = -(-tokens * top_k // experts)
    whole = run_ranks(2, with_capacity, "packed", dict(dp=2), plan)
    spread = run_ranks(2, with_capacity, "packed", dict(dp=2, ep=2), plan)
    unlimited = run_ranks(2, with_capacity, "packed", dict(dp=2, ep=2), {})
    roomy = run_ranks(2, with_capacity, "packed", dict(dp=2, ep=2), dict(capacity=experts))
    for alone, shared, free, room in zip(whole, spread, unlimited, roomy, strict=True):
        assert alone["kept"] == shared["kept"]
        assert shared["kept"][0] == [min(load, limit) for load in shared["load"][0]]
        assert any(load > limit for load in shared["load"][0])
        assert abs(alone["loss"] - shared["loss"]) <= EXACT * alone["loss"]
        for name, grad in alone["grads"].items():
            torch.testing.assert_close(shared["grads"][name], grad, rtol=1e-10, atol=1e-14)
        assert shared["loss"] != free["loss"]
        assert room["loss"] == free["loss"]
        assert room["kept"] == room["load"] == free["load"]
        assert free["kept"] == [[0] * experts] * 2


# ---- load


def loads(recompute: bool) -> list[Any]:
    mesh = Mesh(dp=2, ep=2)
    model = parallelize(plain_models.build("stacked"), mesh, Plan(recompute=recompute))
    chosen: list[Tensor] = []
    for layer in model.layers:  # type: ignore[union-attr]
        layer.moe.gate.register_forward_hook(lambda *hook: chosen.append(plain_models.top_k_of(hook[2])[0]))
    for step in range(2):
        model(**plain_models.make_batch(mesh.data_rank + 10 * step)).backward()
    count = 4 if recompute else 2
    assert len(chosen) == 2 * count, "recomputation did not run, or ran twice"
    first = chosen[0:1] + (chosen[4:5] if recompute else chosen[2:3])
    want = Counter(int(expert) for ids_TK in first for expert in ids_TK.flatten())
    found = expert_load(model)
    again = expert_load(model, reset=True)
    empty = expert_load(model)
    return [
        {path: load.tolist() for path, load in found.items()},
        [want[expert] for expert in range(plain_models.NUM_EXPERTS)],
        all(torch.equal(found[path], again[path]) for path in found),
        sum(int(load.sum()) for load in empty.values()),
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_load_counts_each_route_once(recompute: bool) -> None:
    for found, want, kept, left in run_ranks(2, loads, recompute):
        assert list(found) == ["layers.0.moe.experts", "layers.1.moe.experts"]
        assert found["layers.0.moe.experts"] == want
        assert all(sum(load) == 2 * 18 * plain_models.TOP_K for load in found.values())
        assert kept
        assert left == 0


# ---- refusals


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class FiveExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = plain_models.ListedExperts()
        self.experts.mlps = self.experts.mlps[:5]


def refuse(what: str) -> str:
    try:
        if what == "twice":
            model = parallelize(plain_models.build("packed"), Mesh(dp=2, ep=2))
            parallelize(model, Mesh(dp=2, ep=2))
        elif what == "inner":
            model = plain_models.build("packed")
            parallelize(model.layers[0], Mesh(dp=2, ep=2))
            parallelize(model, Mesh(dp=2, ep=2))
        elif what == "outer":
            model = plain_models.build("stacked")
            parallelize(model, Mesh(dp=2, ep=2))
            parallelize(model.layers[0], Mesh(dp=2, ep=2))
        elif what == "dense":
            parallelize(Dense(), Mesh(dp=2, ep=2))
        elif what == "indivisible":
            parallelize(FiveExperts(), Mesh(dp=2, ep=2))
        elif what == "unwrapped":
            expert_load(plain_models.build("packed"))
        else:
            parallelize(plain_models.build("packed"), Mesh(**{"dp": 1, what: 2}))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    "what, text",
    [
        ("twice", "the model (FSDPModel) is wrapped already. Build the model anew, and wrap it once and as a whole."),
        ("inner", "layers.0 (FSDPLayer) is wrapped already."),
        ("outer", "the model (FSDPLayer) is wrapped already."),
        ("dense", "ep (2) needs experts, and Dense has none. Set ep=1."),
        ("indivisible", "ep (2) must divide the number of experts (5) of experts. On this many ranks ep can be 1."),
        ("unwrapped", "Model is not wrapped yet: call moeweave.parallelize(model, mesh) first."),
        ("sp", "sp and tp_sequence cannot see what Model does with positions."),
    ],
)
def test_what_cannot_be_wrapped_is_refused_on_every_rank(what: str, text: str) -> None:
    assert [message[: len(text)] for message in run_ranks(2, refuse, what)] == [text] * 2


def dense_model(data: str) -> bool:
    """A model without experts is data-parallel all the same."""
    mesh = Mesh(dp=2)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    reference = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    reference.load_state_dict(model.state_dict())
    parallelize(model, mesh, Plan(data=data))
    x = torch.arange(12.0).view(4, 3)
    reference(x).square().mean().backward()
    model(x[2 * mesh.rank : 2 * mesh.rank + 2]).square().mean().backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return all(torch.allclose(a, p.grad, rtol=1e-5) for a, p in zip(grads, reference.parameters(), strict=True))


@pytest.mark.parametrize("data", ENGINES)
def test_a_dense_model(data: str) -> None:
    assert all(run_ranks(2, dense_model, data))


def one_rank(kind: str) -> Trained:
    return train(Steps(kind, dict()))


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_on_one_rank(kind: str) -> None:
    for found in run_ranks(1, one_rank, kind):
        check(found, EXACT if kind in KINDS else FP32)


def failing_rank() -> None:
    mesh = Mesh(dp=2, ep=2)
    model = plain_models.build("packed")
    if mesh.rank == 1:
        raise ArithmeticError("rank 1 gave up")
    parallelize(model, mesh)
    model(**plain_models.make_batch(0)).backward()


def test_a_rank_that_raises_is_what_the_others_end_with() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed: ArithmeticError: rank 1 gave up"):
        run_ranks(2, failing_rank)
