"""Blocks between processes over torch's symmetric memory: on as many GPUs as there are, or all ranks on one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rank_processes import outputs_of

pytestmark = pytest.mark.gpu
CASE = Path(__file__).with_name("blocks_rank_case.py")


@pytest.mark.parametrize("world", [2, 4])
def test_round_trips(world: int, tmp_path: Path) -> None:
    for code, output in outputs_of(CASE, "round", world, tmp_path):
        assert code == 0, output
        assert "done" in output


def test_the_layer_has_the_bits_of_collectives(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("collectives of NCCL want a GPU a rank")
    for code, output in outputs_of(CASE, "layer", 2, tmp_path):
        assert code == 0, output
        assert "done" in output


def test_survivors_name_a_killed_rank_within_the_deadline(tmp_path: Path) -> None:
    *survivors, (code, output) = outputs_of(CASE, "killed", 3, tmp_path)
    assert code == -9, output
    for code, output in survivors:
        assert code == 3, output
        found = re.search(r"([\d.]+) s: (push|dma) plane, rank \d of 3: \w+ waited 10 s .* of rank 2", output)
        assert found, output
        assert float(found[1]) < 25.0
