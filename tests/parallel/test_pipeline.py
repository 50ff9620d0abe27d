"""Pipeline stages: the same loss, gradients and norm as one process, on every mesh and schedule that is supported."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import hf_zoo
import plain_models
from moeweave.parallel.checkpoint import load, save
from moeweave.parallel.grad_norm import clip_grad_norm_, param_groups
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.names import named_params
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.schedules import Layout
from moeweave.parallel.stages import share_out
from moeweave.parallel.verify import ParityReport, gradient_parity
from run_ranks import RankError, run_ranks

# torch 2.11 opens dualpipev by a message from a rank to itself, which gloo cannot send.
V_ON_GLOO = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
SCHEDULES = ["1f1b", "gpipe", "interleaved", "zero_bubble", *(["dualpipev"] if V_ON_GLOO else [])]
MODELS = ["mixtral", "qwen3_moe", "deepseek_v3"]
PP2 = dict(pp=2)
PP2_DP2 = dict(pp=2, dp=2)
PP2_EP2 = dict(pp=2, dp=2, ep=2)


def prove(name: str, sizes: dict[str, int], schedules: list[str]) -> list[ParityReport]:
    mesh = Mesh(**sizes)
    if name == "packed":
        build, make_batch = partial(plain_models.build, name, num_layers=4), partial(plain_models.make_batch, rows=4)
    else:
        build = partial(hf_zoo.build, name, num_hidden_layers=4)
        make_batch = partial(hf_zoo.make_batch, name, rows=4)
    return [gradient_parity(build, make_batch, mesh, Plan(schedule=each)) for each in schedules]


def check(name: str, sizes: dict[str, int], schedules: list[str]) -> None:
    for reports in run_ranks(sizes["pp"] * sizes.get("dp", 1), prove, name, sizes, schedules):
        for report in reports:
            assert report.worst <= 1e-5, (report.worst_name, report.worst)
            assert report.loss_error <= 1e-5
            assert report.norm_error <= 1e-6


@pytest.mark.parametrize("name", [*MODELS, "packed"])
def test_parity_of_all_schedules_on_two_stages(name: str) -> None:
    check(name, PP2, SCHEDULES)


@pytest.mark.parametrize("sizes", [pytest.param(PP2_DP2, marks=pytest.mark.slow), PP2_EP2], ids=["dp", "ep"])
@pytest.mark.parametrize("name", [pytest.param(each, marks=pytest.mark.slow) for each in MODELS[:2]] + MODELS[2:])
def test_parity_with_data_and_expert_ranks(name: str, sizes: dict[str, int]) -> None:
    check(name, sizes, SCHEDULES)


def tied(schedule: str, sizes: dict[str, int]) -> tuple[ParityReport, list[bool]]:
    """The proof, and whether first and last stage have the same weight after two clipped steps."""
    mesh = Mesh(**sizes)
    build = partial(hf_zoo.build, "qwen3_moe", num_hidden_layers=4, tie_word_embeddings=True)
    make_batch = partial(hf_zoo.make_batch, "qwen3_moe", rows=4)
    model = parallelize(build(), mesh, Plan(schedule=schedule))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01))
    for step in range(2):
        forward_backward(model, make_batch(mesh.data_rank + 10 * step), 4)
        forward_backward(model, make_batch(mesh.data_rank + 20 * step), 4)  # accumulated
        clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    mine = [p for name, p in named_params(model).items() if name == "model.embed_tokens.weight"]
    weights = [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in mine]
    found: list[Any] = [None] * mesh.world
    torch.distributed.all_gather_object(found, weights)
    every = [weight for each in found for weight in each]
    report = gradient_parity(build, make_batch, mesh, Plan(schedule=schedule))
    return report, [torch.equal(weight, every[0]) for weight in every]


@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [("1f1b", PP2), (SCHEDULES[-1], PP2), ("zero_bubble", PP2_EP2), ("1f1b", dict(pp=2, tp=2))],
    ids=["1f1b", "last", "dp-ep", "tp"],
)
def test_embeddings_tied_to_the_head_stay_equal_and_count_once(schedule: str, sizes: dict[str, int]) -> None:
    ranks = sizes["pp"] * sizes.get("dp", 1) * sizes.get("tp", 1)
    for report, same in run_ranks(ranks, tied, schedule, sizes):
        assert report.worst <= 1e-5, (report.worst_name, report.worst)
        assert report.norm_error <= 1e-6
        assert len(same) >= ranks // sizes["pp"]
        assert all(same)


def accumulated(schedule: str) -> list[float]:
    """Relative difference of the gradients of two steps and twice those of one."""
    mesh = Mesh(pp=2, dp=2)
    model = parallelize(hf_zoo.build("mixtral", num_hidden_layers=4), mesh, Plan(schedule=schedule))
    batch = hf_zoo.make_batch("mixtral", mesh.data_rank, rows=4)
    forward_backward(model, batch, 4)
    once = {name: param.grad.clone() for name, param in model.named_parameters()}
    forward_backward(model, batch, 4)
    return [float((param.grad - 2 * once[name]).norm() / once[name].norm()) for name, param in model.named_parameters()]


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_gradients_accumulate_over_steps(schedule: str) -> None:
    assert max(max(errors) for errors in run_ranks(4, accumulated, schedule)) <= 1e-6


def step_and_count(schedule: str) -> tuple[int, str]:
    """Dispatches of one step on this rank; what a direct call says."""
    mesh = Mesh(pp=2)
    model = parallelize(hf_zoo.build("mixtral", num_hidden_layers=4), mesh, Plan(schedule=schedule))
    count = 0
    for call in vars(model)["_moeweave"].calls:
        own = call.dispatcher

        class Counting:
            def dispatch(self, *args: Any, own: Any = own, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                return own.dispatch(*args, **kwargs)

            def __getattr__(self, name: str, own: Any = own) -> Any:
                return getattr(own, name)

        call.dispatcher = Counting()
    batch = hf_zoo.make_batch("mixtral", 0, rows=4)
    forward_backward(model, batch, microbatches=4)
    with pytest.raises(RuntimeError) as error:
        model(**batch)
    return count, str(error.value)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_forward_but_the_steps_own(schedule: str) -> None:
    found = run_ranks(2, step_and_count, schedule)
    assert sum(count for count, _ in found) == 4 * 4  # layers x micro-batches
    assert all("forward_backward" in called for _, called in found)


def names_and_checkpoint(path: str) -> tuple[list[str], bool, float, float]:
    """Names on this rank; whether a checkpoint restores its parameters; the loss before and after."""
    mesh = Mesh(pp=2)
    build = partial(hf_zoo.build, "mixtral", num_hidden_layers=4)
    model = parallelize(build(), mesh)
    batch = hf_zoo.make_batch("mixtral", 0, rows=4)
    before = forward_backward(model, batch, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    save(path, model, optimizer, step=3)
    want = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    optimizer.zero_grad()
    load(path, model, optimizer)
    same = all(torch.equal(param, want[name]) for name, param in model.named_parameters())
    after = forward_backward(model, batch, 2)
    return list(want), same, float(before), float(after)


def test_names_stay_and_checkpoints_restore(tmp_path: Any) -> None:
    found = run_ranks(2, names_and_checkpoint, str(tmp_path / "step"))
    names = sorted(name for each, *_ in found for name in each)
    assert names == sorted(name for name, _ in hf_zoo.build("mixtral", num_hidden_layers=4).named_parameters())
    for _, same, before, after in found:
        assert same
        assert before == after


def refused(name: str, overrides: dict[str, Any], plan: dict[str, Any], microbatches: int) -> None:
    model = parallelize(hf_zoo.build(name, **overrides), Mesh(pp=2), Plan(**plan))
    forward_backward(model, hf_zoo.make_batch(name, 0, rows=4), microbatches)


@pytest.mark.parametrize(
    "overrides, plan, microbatches, words",
    [
        ({}, dict(schedule="interleaved"), 2, "1 to 2"),
        ({}, {}, 1, "at least 2"),
        ({}, {}, 3, "divide over the micro-batches"),
    ],
    ids=["too few layers", "too few micro-batches", "rows"],
)
def test_what_is_refused(overrides: dict[str, Any], plan: dict[str, Any], microbatches: int, words: str) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(2, refused, "mixtral", overrides, plan, microbatches)
    assert words in str(error.value)


class Outside(plain_models.Model):
    """Computes with the hidden states outside of its layers: "residual" between them, "norm" before them."""

    def __init__(self, what: str) -> None:
        super().__init__("packed", num_layers=4)
        self.chained_layers = what != "residual"
        if what == "norm":
            layers, self.layers = self.layers, None
            del self.layers
            self.embed_norm = torch.nn.LayerNorm(plain_models.DIM)
            self.layers = layers


def refused_plain(what: str) -> None:
    parallelize(Outside(what), Mesh(pp=2, device="cpu"))


@pytest.mark.parametrize("what, words", [("residual", "chained_layers = True"), ("norm", "before the layers")])
def test_what_a_border_between_stages_cannot_carry_is_refused(what: str, words: str) -> None:
    with pytest.raises(RankError, match=words):
        run_ranks(2, refused_plain, what)


def test_layers_are_shared_out_by_cost() -> None:
    assert share_out([1, 1, 1, 1], 2, 0, 2) == [range(3), range(3, 4)]
    assert share_out([5, 1, 1, 1], 2, 0, 0) == [range(1), range(1, 4)]
    with pytest.raises(ValueError, match="1 to 3"):
        share_out([1, 1, 1], 4, 0, 0)


def test_stages_of_ranks() -> None:
    assert [Layout("interleaved", 2).stages_of(rank) for rank in range(2)] == [[0, 2], [1, 3]]
    assert [Layout("dualpipev", 2).stages_of(rank) for rank in range(2)] == [[0, 3], [1, 2]]
