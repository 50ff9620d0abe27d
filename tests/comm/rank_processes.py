"""Ranks as processes of their own, which no agent watches: it would end the survivors of a killed one first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def outputs_of(program: Path, case: str, world: int, folder: Path) -> list[tuple[int, str]]:
    """Exit code and output of every rank of `program rank world file case`."""
    root = str(program.parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(world), str(folder / "store"), case],
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
