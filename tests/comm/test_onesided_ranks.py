"""Ranks of their own processes over torch's symmetric memory: on as many GPUs as there are, or all on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
CASE = Path(__file__).with_name("onesided_rank_case.py")


def run(case: str, world: int, tmp_path: Path) -> list[tuple[int, str]]:
    """Exit code and output of every rank. No agent watches them: it would end the survivors first."""
    root = str(CASE.parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, CASE, str(rank), str(world), str(tmp_path / "store"), case],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.mark.parametrize("world", [2, 4])
def test_round_trips(world: int, tmp_path: Path) -> None:
    for code, output in run("round", world, tmp_path):
        assert code == 0, output
        assert "done" in output


def test_survivors_name_a_killed_rank_within_the_deadline(tmp_path: Path) -> None:
    *survivors, (code, output) = run("killed", 3, tmp_path)
    assert code == -9, output
    for code, output in survivors:
        assert code == 3, output
        found = re.search(
            r"([\d.]+) s: onesided, rank \d of 3: (plan|dispatch|combine) waited 10 s .* of rank 2", output
        )
        assert found, output
        assert float(found[1]) < 25.0
