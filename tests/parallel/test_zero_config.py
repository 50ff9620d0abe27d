"""What a ZeRO plan takes from the user's DeepSpeed config, and what it refuses, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_zoo
import moeweave as mw
from moeweave.parallel.data_deepspeed_config import check_zero, fill_config
from moeweave.parallel.mesh import MeshSizes
from run_ranks import RankError, run_ranks
from train_steps import Steps, batch_of, whole

pytest.importorskip("deepspeed")

EP2 = dict(dp=2, ep=2)


def filled(config: Any, data: str = "zero2", data_size: int = 4, bf16: bool = False) -> dict[str, Any]:
    return fill_config(mw.Plan(data=data, ds_config=config), data_size, bf16)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage \(3\) must be 2: Plan.data is 'zero2'"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled \(True\) must be False"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer .*given to mw.prepare_optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer .*norm"),
        ({"zero_optimization": {"reduce_scatter": False}}, r"zero_optimization.reduce_scatter \(False\) must be True"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"train_batch_size": 0}, r"train_batch_size \(0\) must be a whole number"),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3},
            r"train_batch_size \(16\) must be .*\(3 \* 1 \* 4\)",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel .*Mesh\(tp=\)"),
    ],
)
def test_contradictions_are_refused_by_name(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"ds_config.{text}"):
        filled(config)


def test_the_rest_is_kept_and_filled_in(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": "auto", "overlap_comm": True, "reduce_bucket_size": 1000},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    for config in (given, path, str(path)):
        found = filled(config)
        assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
        assert found["gradient_clipping"] == 0.5
        # One micro-batch a boundary for DeepSpeed: forward_backward sets the boundaries.
        assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (16, 1)
        assert not found["bf16"]["enabled"]
    assert given["zero_optimization"] == {"stage": "auto", "overlap_comm": True, "reduce_bucket_size": 1000}
    assert filled(None, bf16=True)["bf16"]["enabled"]


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, text in (
        ("none.json", "cannot be read"),
        ("bad.json", "no JSON"),
        ("list.json", "must hold a JSON object"),
    ):
        with pytest.raises(ValueError, match=text):
            filled(str(tmp_path / name))


@pytest.mark.parametrize(
    ("sizes", "data", "text"),
    [
        (dict(dp=2, pp=2), "zero1", r"pp \(2\) must be 1 with Plan\(data='zero1'\)"),
        (dict(dp=2, etp=2), "zero1", r"etp \(2\)"),
        (dict(dp=2, dp_replicate=2), "zero2", r"dp_replicate \(2\) .*multiply dp"),
        (dict(dp=2, tp=2), "zero3", r"tp \(2\) .*Use 'zero2'"),
    ],
)
def test_axes_that_zero_lacks_are_refused(sizes: dict[str, int], data: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_zero(hf_zoo.ZOO["mixtral"](), mw.Plan(data=data), MeshSizes(**sizes))


def test_parameters_without_masters_are_refused() -> None:
    model = hf_zoo.ZOO["mixtral"]()
    with pytest.raises(ValueError, match=r"parameters in torch.float64"):
        check_zero(model.double(), mw.Plan(data="zero1"), MeshSizes(dp=2))
    with pytest.raises(ValueError, match=r"no float32 masters"):
        check_zero(model.bfloat16(), mw.Plan(data="zero0"), MeshSizes(dp=2))
    with pytest.raises(ValueError, match=r"Plan.dtype \('bfloat16'\)"):
        mw.Plan(data="zero0", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"ds_config needs data='zero0'"):
        mw.Plan(ds_config={"gradient_clipping": 1.0})


# ---- in a run


def weights(model: Any) -> dict[str, torch.Tensor]:
    with model._moeweave.zero.whole():
        return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def step_of(plan: dict[str, Any], max_norm: float | None, thrown_away: int = 0) -> dict[str, torch.Tensor]:
    """Weights after one step of SGD, `thrown_away` batches having been forgotten before."""
    mesh = mw.Mesh(**EP2)
    model = mw.parallelize(hf_zoo.ZOO["mixtral"](), mesh, mw.Plan(**plan))
    optimizer = mw.prepare_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    what = Steps("mixtral", EP2, rows=(2, 4))
    for index in range(thrown_away, -1, -1):
        mw.forward_backward(model, batch_of(what, mesh.data_rank, index), 2)
        if index:
            optimizer.zero_grad()
    if max_norm is not None:
        mw.clip_grad_norm_(model, max_norm)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 2  # dense and experts: split here
    return weights(model)


def alike(stage: int) -> list[bool]:
    """Whether steps are equal that should be, and others are not: see the test."""
    plan: dict[str, Any] = dict(data=f"zero{stage}")
    clipped, free = step_of(plan, 0.3), step_of(plan, None)
    by_config = step_of({**plan, "ds_config": {"gradient_clipping": 0.3, "gradient_accumulation_steps": 2}}, None)
    second = step_of(plan, 0.3, thrown_away=2)
    name = "model.layers.0.mlp.experts.down_proj"
    same = [all(torch.equal(clipped[key], other[key]) for key in clipped) for other in (by_config, second)]
    return [*same, not torch.equal(clipped[name], free[name])]


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_clipping_by_the_config_and_gradients_that_are_forgotten(stage: int) -> None:
    """The config's clipping is the call's; batches before zero_grad leave nothing; unclipped is another step."""
    assert run_ranks(2, alike, stage) == [[True, True, True]] * 2


def refusals() -> list[str]:
    mesh = mw.Mesh(**EP2)
    config = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    model = mw.parallelize(hf_zoo.ZOO["mixtral"](), mesh, mw.Plan(data="zero1", ds_config=config))
    batch = batch_of(Steps("mixtral", EP2), mesh.data_rank, 0)
    inner = torch.optim.AdamW(mw.param_groups(model), lr=1e-3)
    found: list[str] = []

    def refused(call: Any, *args: Any) -> None:
        with pytest.raises((ValueError, RuntimeError)) as error:
            call(*args)
        found.append(str(error.value))

    refused(mw.forward_backward, model, batch, 2)
    refused(mw.prepare_optimizer, model, torch.optim.SGD(torch.nn.Linear(2, 2).parameters()))
    optimizer = mw.prepare_optimizer(model, inner)
    refused(mw.prepare_optimizer, model, inner)
    refused(mw.forward_backward, model, batch, 1)
    refused(optimizer.step)
    mw.forward_backward(model, batch, 2)
    refused(mw.clip_grad_norm_, model, 1.0)
    refused(mw.clip_grad_norm_, model, 0.5, 1.0)
    refused(optimizer.state_dict)
    refused(mw.save, "nowhere", model, inner)
    return found


def test_calls_that_cannot_work_say_what_would() -> None:
    texts = [
        "Make it first: optimizer = mw.prepare_optimizer(model, optimizer)",
        "that is not the model's",
        "call prepare_optimizer once",
        "microbatches (1) contradicts ds_config.gradient_accumulation_steps (2)",
        "optimizer.step needs the gradients of mw.forward_backward",
        "max_norm (1.0) contradicts ds_config.gradient_clipping (0.5)",
        "norm_type (1.0) must be 2",
        "use mw.save and mw.load",
        "another optimizer was passed",
    ]
    for found in run_ranks(2, refusals):
        assert len(found) == len(texts)
        for got, text in zip(found, texts, strict=True):
            assert text in got


def wrap_across() -> None:
    mw.parallelize(hf_zoo.ZOO["mixtral"](), mw.Mesh(dp_replicate=2), mw.Plan(data="zero2"))


def test_parallelize_refuses_before_it_touches_the_model() -> None:
    with pytest.raises(RankError, match=r"dp_replicate \(2\) must be 1"):
        run_ranks(2, wrap_across)
