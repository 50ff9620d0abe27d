"""Ranks of their own processes over torch's symmetric memory: on as many GPUs as there are, or all on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rank_processes import check_done, check_survivors, outputs_of

pytestmark = pytest.mark.gpu
CASE = Path(__file__).with_name("onesided_rank_case.py")


@pytest.mark.parametrize("world", [2, 4])
def test_round_trips(world: int, tmp_path: Path) -> None:
    check_done(outputs_of(CASE, "round", world, tmp_path))


def test_survivors_name_a_killed_rank_within_the_deadline(tmp_path: Path) -> None:
    check_survivors(outputs_of(CASE, "killed", 3, tmp_path), r"onesided, rank \d of 3: (plan|dispatch|combine)")
