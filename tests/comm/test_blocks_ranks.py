"""Blocks between processes over torch's symmetric memory: on as many GPUs as there are, or all ranks on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rank_processes import check_done, check_survivors, outputs_of

pytestmark = pytest.mark.gpu
CASE = Path(__file__).with_name("blocks_rank_case.py")


@pytest.mark.parametrize("world", [2, 4])
def test_round_trips(world: int, tmp_path: Path) -> None:
    check_done(outputs_of(CASE, "round", world, tmp_path))


def test_the_layer_has_the_bits_of_collectives(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("collectives of NCCL want a GPU a rank")
    check_done(outputs_of(CASE, "layer", 2, tmp_path))


def test_survivors_name_a_killed_rank_within_the_deadline(tmp_path: Path) -> None:
    check_survivors(outputs_of(CASE, "killed", 3, tmp_path), r"(push|dma) plane, rank \d of 3: \w+")
