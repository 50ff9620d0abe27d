"""Slurm, Kubernetes and SkyPilot as far as a machine without them can show: what their commands are given, and the
traps of the batch script. The commands are stand-ins that note their arguments."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

from moeweave.launch import submission
from moeweave.launch.launchers import slurm
from moeweave.launch.launchers.kubernetes import Kubernetes
from moeweave.launch.launchers.skypilot import Skypilot
from moeweave.launch.launchers.slurm import Slurm
from moeweave.launch.schema import ConfigError
from programs import start
from test_submit import JOB

STAND_IN = """#!{python}
import json, os, sys
with open({notes!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print({says!r})
sys.exit({code})
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """`tools(name, says, code)` puts a stand-in on the path; `tools.seen()` are the command lines that were run."""
    folder, notes = tmp_path / "tools", tmp_path / "notes.jsonl"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, says: str = "", code: int = 0) -> None:
        text = STAND_IN.format(python=sys.executable, notes=str(notes), says=says, code=code)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    make.seen = lambda: [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    return make


@pytest.fixture
def place(tmp_path):
    made = submission.new(tmp_path / "run")
    submission.create(made, launcher="x", options={}, name="x")
    return made


def test_slurm_takes_a_job_and_answers_for_it(tools, place):
    tools("sbatch", "42;cluster")
    tools("sacct", "42|RUNNING|0:0|00:01:00|node[1-2]")
    tools("scancel")
    assert Slurm().submit(JOB, place) == 0
    assert place.state["id"] == "42"
    assert Slurm().status(place) == "42|RUNNING|0:0|00:01:00|node[1-2]"
    assert Slurm().stop(place) == "job 42 is cancelled"
    sbatch, sacct, scancel = tools.seen()
    assert sbatch == ["sbatch", "--parsable", "--chdir=/home/me/work", "--output=/runs/tiny/submit/0/slurm.log"]
    assert "42" in sacct and scancel == ["scancel", "42"]


def test_slurm_that_refuses_is_quoted(tools, place):
    tools("sbatch", "sbatch: error: invalid partition specified: gpu", code=1)
    with pytest.raises(ConfigError, match="sbatch refused the job: sbatch: error: invalid partition specified: gpu"):
        Slurm(partition="gpu").submit(JOB, place)
    assert Slurm().check(JOB) == ["sbatch --test-only: sbatch: error: invalid partition specified: gpu"]
    assert tools.seen()[-1][-1] == "--test-only"


def test_slurms_check_asks_the_nodes(tools):
    answer = {"host": "n1", "versions": {"torch": "1.0"}, "problems": ["has 0 accelerators and needs 8"]}
    tools("sbatch", "sbatch: Job 43 to start at now")
    tools("srun", "0: moeweave-probe: " + json.dumps(answer))
    found = Slurm(partition="gpu").check(JOB)
    assert any(text.startswith("n1 has torch 1.0, and this machine ") for text in found)
    assert "n1 has 0 accelerators and needs 8" in found
    srun = tools.seen()[-1]
    assert "--partition=gpu" in srun and "--nodes=2" in srun
    assert not [word for word in srun if word.startswith(("--signal", "--requeue"))]


@pytest.mark.parametrize("how, again", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_batch_script_ends_its_ranks_and_asks_again_only_on_slurms_own_signal(tools, tmp_path, how, again):
    tools("scontrol", "node-a")
    srun = tmp_path / "tools/srun"
    trap = "trap 'sleep 0.3; echo saved >saved; exit 7' TERM"
    srun.write_text(f"#!/bin/bash\n{trap}\necho $$ >up\nwhile :; do sleep 0.05; done\n")
    srun.chmod(0o755)
    scancel = tmp_path / "tools/scancel"
    scancel.write_text('#!/bin/bash\n[ "$*" = "--signal=TERM 42" ] && kill -TERM "$(cat up)"\n')
    scancel.chmod(0o755)
    script = Slurm().render(dataclasses.replace(JOB, directory=str(tmp_path)))
    variables = {**os.environ, "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node-[a-b]"}
    running = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=variables)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() or not (tmp_path / "up").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(how)
    assert running.wait(60) == 7  # the ranks' own code, after they saved
    assert (tmp_path / "saved").exists()
    assert (["scontrol", "requeue", "42"] in tools.seen()) is again


@pytest.mark.skipif("shutdown_timeout" not in LaunchConfig.__dataclass_fields__, reason="this torch always gives 30 s")
@pytest.mark.parametrize("grace, seconds", [(4, 3), (120, 100), (3600, 3580)])
def test_the_agent_gives_its_ranks_slurms_grace(tmp_path, grace, seconds):
    """A rank that ends only when it is killed shows the limit, where that is short."""
    line = f"export {slurm.STOP_SECONDS}={seconds}"
    assert line in Slurm(grace_seconds=grace).render(JOB).splitlines()
    assert line.replace(str(seconds), "9") in Slurm().render(dataclasses.replace(JOB, env={slurm.STOP_SECONDS: "9"}))
    if seconds > 10:
        return
    (tmp_path / "my.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('up', 'w').close()\ntime.sleep(600)\n"
    )
    words = ["--nnodes", "1", "--nproc-per-node", "1", "--rdzv-endpoint", "127.0.0.1:0", "my.py"]
    running = start(
        "moeweave.launch.agent", *words, cwd=tmp_path, PET_RDZV_ID="x", **{slurm.STOP_SECONDS: str(seconds)}
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGTERM)
    done = running.wait(25)  # less than torch's own 30 seconds
    assert (done.code, done.left) == (143, ()), done.err


def test_kubernetes_takes_a_job_and_answers_for_it(tools, place):
    launcher, job = Kubernetes(namespace="ml"), dataclasses.replace(JOB, container="image")
    tools("kubectl", "trainjob created")
    assert launcher.check(job) == []
    assert launcher.submit(job, place) == 0
    assert place.state["id"] == "tiny-run-01234567"
    for ask in (launcher.status, launcher.logs, launcher.stop):
        assert ask(place).strip() == "trainjob created"
    words = tools.seen()
    assert all(line[:3] == ["kubectl", "--namespace", "ml"] for line in words)
    assert [line[3] for line in words] == ["create", "create", "get", "logs", "delete"]
    assert "--dry-run=server" in words[0] and "--dry-run=server" not in words[1]
    tools("kubectl", "error: no matches for kind TrainJob", code=1)
    with pytest.raises(ConfigError, match="no matches for kind TrainJob"):
        launcher.submit(job, place)


def test_skypilot_takes_a_task_and_answers_for_it(tools, place):
    launcher = Skypilot(accelerators="H100:8")
    tools("sky", "ok")
    assert launcher.check(JOB) == []
    assert launcher.submit(JOB, place) == 0
    assert place.state["id"] == "tiny-run-012345"
    assert launcher.status(place) == "ok"
    assert launcher.stop(place) == "the jobs of tiny-run-012345 are cancelled"
    words = tools.seen()
    assert [line[1] for line in words] == ["launch", "launch", "queue", "cancel"]
    assert "--dryrun" in words[0]
    assert words[1][-1] == f"{place.path}/job.yaml"
    assert not Path(words[0][-1]).exists()  # the dry run's task was a temporary one


def test_a_machine_without_the_commands_says_so(place, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    job = dataclasses.replace(JOB, container="image")
    assert "has no sbatch" in Slurm().check(JOB)[0]
    assert "has no kubectl" in Kubernetes().check(job)[0]
    assert "has no sky" in Skypilot(accelerators="H100:8").check(JOB)[0]
    with pytest.raises(ConfigError, match="has no sbatch"):
        Slurm().submit(JOB, place)
