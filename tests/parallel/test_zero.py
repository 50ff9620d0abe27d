"""DeepSpeed's ZeRO as the engine: clipped updates and norms of one process, micro-batches, bfloat16, checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_zoo
import moeweave as mw
from moeweave.parallel.names import named_state
from moeweave.parallel.verify import ParityReport, gradient_parity
from run_ranks import run_ranks
from train_steps import Steps, Trained, batch_of, check, train_each, whole

pytest.importorskip("deepspeed")

EP2 = dict(dp=2, ep=2)
TP2_EP2 = dict(dp=2, tp=2, ep=2)
FP32 = dict(dtype=torch.float32)


def check_zero(found: Trained) -> None:
    check(found, 1e-5)
    for got, want in zip(found.norms, found.reference_norms, strict=True):
        assert abs(got - want) <= 1e-6 * want
    assert found.norms[0] > 0.7  # clipped


# ---- updates and norms


def test_clipped_updates_and_norms_are_those_of_one_process() -> None:
    cases = [Steps("mixtral", EP2, dict(data=f"zero{stage}")) for stage in range(4)]
    # Experts of every build; no row for the experts of the second rank; a rank without a label; unequal batches.
    cases.append(Steps("stacked", EP2, dict(data="zero1"), options=FP32, tweak="one_rank_has_all_experts_chosen"))
    cases.append(Steps("modulelist", EP2, dict(data="zero2"), options=FP32, rows=(3, 1), ignored=(1,)))
    cases.append(Steps("registered", EP2, dict(data="zero3"), options=FP32, rows=(1, 3)))
    for each in run_ranks(2, train_each, cases):
        for found in each:
            check_zero(found)


def test_updates_under_tp_and_with_copies_of_experts() -> None:
    cases = [Steps("mixtral", TP2_EP2, dict(data=f"zero{stage}")) for stage in (1, 2)]
    cases.append(Steps("mixtral", dict(dp=4, ep=2), dict(data="zero3")))
    for each in run_ranks(4, train_each, cases):
        for found in each:
            check_zero(found)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_every_stage_on_every_mesh_of_four_ranks(model: str) -> None:
    meshes: list[dict[str, int]] = [dict(dp=4, ep=2), dict(dp=4, ep=4), dict(dp=4), TP2_EP2, dict(dp=2, tp=2, ep=4)]
    meshes += [dict(dp=2, tp=2)]
    cases = [
        Steps(model, sizes, dict(data=f"zero{stage}"))
        for sizes in meshes
        for stage in range(4)
        if not (stage == 3 and "tp" in sizes)
    ]
    for each in run_ranks(4, train_each, cases, timeout=250):
        for found in each:
            check_zero(found)


def parity(name: str, sizes: dict[str, int], microbatches: int, **plan: Any) -> ParityReport:
    batch = partial(hf_zoo.make_batch, name, rows=3, length=15)
    return gradient_parity(hf_zoo.ZOO[name], batch, mw.Mesh(**sizes), mw.Plan(**plan), microbatches=microbatches)


@pytest.mark.parametrize(
    ("stage", "microbatches", "plan"),
    [
        (0, 2, {}),
        pytest.param(1, 3, {}, marks=pytest.mark.slow),
        (2, 2, dict(recompute=True)),
        pytest.param(3, 2, {}, marks=pytest.mark.slow),
        (3, 2, dict(recompute=True)),
    ],
)
def test_gradients_of_microbatches(stage: int, microbatches: int, plan: dict[str, Any]) -> None:
    for report in run_ranks(2, partial(parity, data=f"zero{stage}", **plan), "qwen3_moe", EP2, microbatches):
        assert report.ok, (report.worst_name, report.worst, report.loss_error)
        assert report.norm_error <= 1e-6
        assert set(report.errors) == {key for key, _ in hf_zoo.ZOO["qwen3_moe"]().named_parameters()}


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_gradients_in_bfloat16(stage: int) -> None:
    for report in run_ranks(2, partial(parity, data=f"zero{stage}", dtype="bfloat16"), "mixtral", EP2, 2):
        assert report.ok, (report.worst_name, report.worst, report.tolerance)


# ---- checkpoints


def start(sizes: dict[str, int], plan: dict[str, Any], lr: float = 1e-2) -> tuple[Any, Any]:
    model = mw.parallelize(hf_zoo.ZOO["mixtral"](), mw.Mesh(**sizes), mw.Plan(**plan))
    return model, mw.prepare_optimizer(model, torch.optim.AdamW(mw.param_groups(model, lr=lr)))


def take_steps(model: Any, optimizer: Any, sizes: dict[str, int], steps: range) -> list[float]:
    what, rank = Steps("mixtral", sizes), model._moeweave.mesh.data_rank
    losses = []
    for step in steps:
        losses.append(float(mw.forward_backward(model, batch_of(what, rank, step), 2)))
        mw.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def copy_of_state(model: Any) -> dict[str, Tensor]:
    with model._moeweave.zero.whole():
        return {name: whole(tensor.detach()).clone() for name, tensor in named_state(model).items()}


def resumed(folder: str, sizes: dict[str, int], plan: dict[str, Any]) -> tuple[bool, bool, int]:
    """Whether losses and weights of steps 2 and 3 are the same bits after a save and a load."""
    model, optimizer = start(sizes, plan)
    take_steps(model, optimizer, sizes, range(2))
    mw.save(folder, model, optimizer, step=2)
    losses = take_steps(model, optimizer, sizes, range(2, 4))
    state = copy_of_state(model)
    again, optimizer = start(sizes, plan, lr=0.5)
    loaded = mw.load(folder, again, optimizer)
    same_losses = take_steps(again, optimizer, sizes, range(2, 4)) == losses
    return (
        same_losses,
        all(torch.equal(state[name], value) for name, value in copy_of_state(again).items()),
        loaded.step,
    )


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, 3])
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path: Path, stage: int) -> None:
    assert run_ranks(2, resumed, str(tmp_path / "saved"), EP2, dict(data=f"zero{stage}")) == [(True, True, 2)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "plan"),
    [
        (dict(dp=4, ep=2), dict(data="zero3", dtype="bfloat16")),
        (dict(dp=4, ep=2), dict(data="zero2", dtype="bfloat16")),
        (dict(dp=4, ep=2), dict(data="zero1")),
        (TP2_EP2, dict(data="zero1", dtype="bfloat16")),
        (TP2_EP2, dict(data="zero2")),
        (TP2_EP2, dict(data="zero0")),
    ],
)
def test_a_resumed_run_on_four_ranks(tmp_path: Path, sizes: dict[str, int], plan: dict[str, Any]) -> None:
    assert run_ranks(4, resumed, str(tmp_path / "saved"), sizes, plan) == [(True, True, 2)] * 4


def weights_elsewhere(folder: str, hf_folder: str) -> tuple[float, float, str, str]:
    """Largest differences of the weights that FSDP2 on another mesh, and transformers, read; two refusals."""
    model, optimizer = start(EP2, dict(data="zero3"))
    take_steps(model, optimizer, EP2, range(1))
    mw.save(folder, model, optimizer, step=1)
    mw.save_pretrained(model, hf_folder)
    state = copy_of_state(model)
    other = mw.parallelize(hf_zoo.ZOO["mixtral"](), mw.Mesh(dp=2))
    mw.load(folder, other)
    differences = [float((whole(value) - state[name]).abs().max()) for name, value in named_state(other).items()]
    plain = type(hf_zoo.ZOO["mixtral"]()).from_pretrained(hf_folder, dtype=torch.float32)
    read = [float((value - state[name]).abs().max()) for name, value in plain.state_dict().items()]
    refusals = []
    for plan in (dict(data="fsdp2"), dict(data="zero2")):
        model, optimizer = start(EP2, plan)
        with pytest.raises(mw.CheckpointError) as refused:
            mw.load(folder, model, optimizer)
        refusals.append(str(refused.value))
    return max(differences), max(read), *refusals


def test_weights_are_read_on_any_mesh_and_the_optimizer_on_the_same(tmp_path: Path) -> None:
    for differences, read, fsdp2, zero2 in run_ranks(2, weights_elsewhere, str(tmp_path / "a"), str(tmp_path / "hf")):
        assert (differences, read) == (0.0, 0.0)
        assert "has engine zero3, and here it is none" in fsdp2
        assert "has engine zero3, and here it is zero2" in zero2


def weights_into_the_engine(folder: str, plan: dict[str, Any]) -> bool:
    """Whether weights read after `prepare_optimizer` are those that the next step starts from."""
    source = mw.parallelize(hf_zoo.ZOO["mixtral"](), mw.Mesh(**EP2))
    with torch.no_grad():
        for param in source.parameters():
            param.mul_(1.5)
    mw.save(folder, source)
    wanted = {name: whole(value) for name, value in named_state(source).items()}
    model, optimizer = start(EP2, plan, lr=0.0)
    mw.load(folder, model)
    take_steps(model, optimizer, EP2, range(1))  # with lr 0 the masters come back as weights
    return all(torch.equal(wanted[name], value) for name, value in copy_of_state(model).items())


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_weights_reach_the_masters(tmp_path: Path, stage: int) -> None:
    assert all(run_ranks(2, weights_into_the_engine, str(tmp_path / "a"), dict(data=f"zero{stage}", dtype=None)))
