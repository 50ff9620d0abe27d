"""The configs with the Hydra to come: every option of every group composes, and what is wrong is refused alike.

It lies unpacked beside the environment (`make test` puts it there); only these processes have it on their path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SITE = Path(sys.prefix) / "hydra-next"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (SITE / "hydra").is_dir(), reason="needs hydra-core 1.4 unpacked by `make test`")


def python(*words: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=200
    )


def test_every_config_composes_and_wrong_ones_are_refused():
    shown = python("-c", "import hydra, omegaconf; print(hydra.__version__, hydra.__file__)")
    assert shown.stdout.startswith("1.4") and str(SITE) in shown.stdout
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/launch/test_compose.py")
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
