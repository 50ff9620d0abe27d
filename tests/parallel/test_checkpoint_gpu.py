"""Checkpoints and Hugging Face folders on the GPUs of this machine, over NCCL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASE = Path(__file__).with_name("checkpoint_gpu_case.py")


@pytest.mark.gpu
@pytest.mark.ranks(2)
@pytest.mark.timeout(500)
def test_checkpoints_on_gpus(tmp_path: Path) -> None:
    ranks = ["--nproc-per-node", str(torch.cuda.device_count())]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks, str(CASE), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=450, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 2
    assert all(report["loads"] and report["exports"] and report["goes_on"] for report in reports), reports
