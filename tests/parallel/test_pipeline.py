"""Pipeline stages: the same loss, gradients and norm as one process, on every mesh and schedule that is supported."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import hf_zoo
import plain_models
from moeweave.parallel.checkpoint import load, save
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.schedules import Layout
from moeweave.parallel.stages import share_out
from moeweave.parallel.verify import ParityReport, gradient_parity
from run_ranks import RankError, run_ranks

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
    check(name, PP2, ["1f1b", "gpipe", "interleaved", "zero_bubble", "dualpipev"])


@pytest.mark.parametrize("sizes", [PP2_DP2, PP2_EP2], ids=["dp", "ep"])
@pytest.mark.parametrize("name", MODELS)
def test_parity_with_data_and_expert_ranks(name: str, sizes: dict[str, int]) -> None:
    check(name, sizes, ["1f1b", "gpipe", "interleaved"])
