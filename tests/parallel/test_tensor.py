"""Tensor parallelism: gradients, norm, tokens and checkpoints of one process, and refusals that say what would fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import hf_zoo
import moeweave as mw
from moeweave.parallel.verify import ParityReport, gradient_parity
from run_ranks import RankError, run_ranks

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3")
MESHES = [
    pytest.param(2, dict(tp=2), id="tp2"),
    pytest.param(2, dict(tp=2, ep=2), id="tp2-ep2"),
    pytest.param(4, dict(dp=2, tp=2, ep=2), id="dp2-tp2-ep2"),
    pytest.param(4, dict(dp=2, tp=2, ep=4), id="dp2-tp2-ep4"),
    pytest.param(4, dict(dp_replicate=2, tp=2), id="rep2-tp2"),
]


def parity(name: str, sizes: dict[str, int]) -> ParityReport:
    # An odd number of tokens: the shares of the tp ranks differ.
    batch = partial(hf_zoo.make_batch, name, rows=3, length=15)
    return gradient_parity(hf_zoo.ZOO[name], batch, mw.Mesh(**sizes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "sizes"), MESHES)
def test_every_gradient_and_the_norm_are_those_of_one_process(name: str, ranks: int, sizes: dict[str, int]) -> None:
    for report in run_ranks(ranks, parity, name, sizes):
        assert report.worst <= 1e-5, (report.worst_name, report.worst)
        assert report.loss_error <= 1e-6
        assert report.norm_error <= 1e-6
        assert set(report.errors) == {key for key, _ in hf_zoo.ZOO[name]().named_parameters()}
