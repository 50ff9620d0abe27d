"""Gradient parity on the GPUs of this machine, over NCCL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASE = Path(__file__).with_name("parity_gpu_case.py")


@pytest.mark.gpu
@pytest.mark.ranks(2)
@pytest.mark.timeout(500)
def test_gradients_on_gpus_equal_one_process():
    ranks = ["--nproc-per-node", str(torch.cuda.device_count())]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks, str(CASE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=450, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 12
    assert all(report["ok"] for report in reports), reports
