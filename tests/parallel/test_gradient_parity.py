"""The proof itself: it passes what is equal, and sees what is not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import hf_zoo
import plain_models
from moeweave.kernels_ext.tolerance import TOLERANCE
from moeweave.parallel.loss import loss_of
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.plan import Plan
from moeweave.parallel.verify import ParityReport, concatenate, gradient_parity
from run_ranks import run_ranks


def doubled_expert(model: nn.Module) -> None:
    model.layers[0].moe.experts.down_proj.register_hook(lambda grad: 2 * grad)  # type: ignore[union-attr]


def frozen_head(model: nn.Module) -> None:
    model.head.weight.requires_grad_(False)  # type: ignore[union-attr]


class OnlyWrapped:
    """Changes the second of the two models that the proof prepares: the wrapped one."""

    def __init__(self, change: Any) -> None:
        self.change, self.calls = change, 0

    def __call__(self, model: nn.Module) -> None:
        self.calls += 1
        if self.calls == 2:
            self.change(model)


def prove(change: str, sizes: dict[str, int], plan: dict[str, Any]) -> ParityReport:
    mesh = Mesh(**sizes)
    prepare = OnlyWrapped(globals()[change]) if change else None
    return gradient_parity(
        lambda: plain_models.build("packed"), plain_models.make_batch, mesh, Plan(**plan), prepare=prepare
    )


def test_equal_models_pass() -> None:
    for report in run_ranks(2, prove, "", dict(dp=2, ep=2), {}):
        assert report.ok
        assert 0 <= report.worst <= report.tolerance == TOLERANCE[torch.float32]
        assert report.norm == pytest.approx(report.reference_norm, rel=1e-5)
        assert len(report.errors) == len(list(plain_models.build("packed").parameters()))


def test_a_factor_in_one_gradient_fails_and_is_named() -> None:
    for report in run_ranks(2, prove, "doubled_expert", dict(dp=2, ep=2), {}):
        assert not report.ok
        assert report.worst_name == "layers.0.moe.experts.down_proj"
        assert report.worst == pytest.approx(1.0, rel=1e-4)
        assert report.loss_error <= report.tolerance


def test_a_missing_gradient_fails_and_is_named() -> None:
    for report in run_ranks(2, prove, "frozen_head", dict(dp=2, ep=2), {}):
        assert not report.ok
        assert (report.worst_name, report.worst) == ("head.weight", float("inf"))


def in_bf16(name: str, sizes: dict[str, int]) -> tuple[ParityReport, float]:
    """The report, and the loss in float32."""
    mesh, plan = Mesh(**sizes), Plan(dtype="bfloat16")
    build, make_batch = partial(plain_models.build, name), plain_models.make_batch
    if name not in plain_models.BLOCKS:
        build, make_batch = hf_zoo.ZOO[name], partial(hf_zoo.make_batch, name)
    whole = concatenate([make_batch(rank) for rank in range(mesh.data_size)], mesh.device)
    return gradient_parity(build, make_batch, mesh, plan), float(loss_of(build()(**whole)).detach())


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("packed", {}),
        ("modulelist", dict(dp=2)),
        ("stacked", dict(dp=2, ep=2)),
        ("modulelist", dict(dp=2, ep=2)),
        ("registered", dict(dp=4, ep=2)),
        ("mixtral", dict(dp=2, ep=2)),
        ("mixtral", dict(dp=4, ep=2)),
        ("gpt_oss", dict(dp_replicate=2, dp=2, ep=2)),
    ],
)
def test_computing_in_bf16(name: str, sizes: dict[str, int]) -> None:
    for report, in_float32 in run_ranks(sizes.get("dp", 1) * sizes.get("dp_replicate", 1), in_bf16, name, sizes):
        assert report.tolerance == TOLERANCE[torch.bfloat16]
        assert report.loss_error <= report.tolerance
        assert report.norm == pytest.approx(report.reference_norm, rel=report.tolerance)
        assert abs(report.loss - in_float32) > 1e-5, "it computed in float32"


def test_batches_of_other_widths_are_padded() -> None:
    whole = concatenate(
        [
            {
                "input_ids": torch.ones(1, 2, dtype=torch.int64),
                "labels": torch.ones(1, 2, dtype=torch.int64),
                "flag": True,
            },
            {
                "input_ids": torch.ones(2, 3, dtype=torch.int64),
                "labels": torch.ones(2, 3, dtype=torch.int64),
                "flag": True,
            },
        ],
        torch.device("cpu"),
    )
    assert whole["input_ids"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert whole["labels"].tolist() == [[1, 1, -100], [1, 1, 1], [1, 1, 1]]
    assert whole["flag"] is True
