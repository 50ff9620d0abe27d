"""moeweave-submit on this machine: what a submission leaves, who can ask for it, and what never starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from moeweave.launch import submit
from programs import fresh, run, start

TINY = [
    "model=qwen3_moe",
    "mesh.dp=2",
    "mesh.ep=2",
    "mesh.device=cpu",
    "data.seq_length=16",
    "batch_size=4",
    "proof=false",
    "run.dir=run",
]
SCRIPT = """
import os, sys
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:], os.environ["MINE"], flush=True)
if sys.argv[1] == "fail" and os.environ["RANK"] == "1":
    raise ValueError("as asked")
if sys.argv[1] == "wait":
    import time
    open(f"ready{os.environ['RANK']}", "w").close()
    time.sleep(200)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "my.py").write_text(SCRIPT)
    return [f"env.FOLDER={tmp_path}", "program=my.py", "ranks_per_node=2", "env.MINE=a $(b) 'c'", "run.dir=run"]


def test_a_program_trains_here_from_the_resolved_file_and_goes_on(tmp_path):
    done = run("submit", *TINY, "steps=2", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    place = tmp_path / "run/submit/0"
    assert f"run:\n  root: runs\n  dir: {tmp_path}/run\n" in (place / "config.yaml").read_text()
    assert (place / "job.sh").read_text().endswith(f" -m moeweave.launch.train --config {place}/config.yaml\n")
    assert oct(place.stat().st_mode)[-3:] == "700"  # the token is in there
    state = run("submit", "status", "run", cwd=tmp_path)
    assert state.out.startswith("done at ")
    again = run("submit", *TINY, "steps=3", cwd=tmp_path)
    assert "resume  step 2 of 3" in again.out
    lines = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]
    assert (tmp_path / "run/submit/1/result.json").exists()


def test_a_benchmark_runs_by_its_own_keys(tmp_path):
    wrong = run("submit", "program=bench", "op=al_reduce", "run.dir=run", cwd=tmp_path)
    assert (wrong.code, "op=al_reduce: must be one of" in wrong.err) == (2, True)
    done = run("submit", "program=bench", "max_size=1024", "iterations=2", "device=cpu", "run.dir=run", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    assert "all_reduce" in done.out


def test_a_script_gets_its_arguments_ranks_and_variables(tmp_path, script):
    done = run("submit", *script, "--", "--lr", "3e-4; touch x", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    expected = "of 2 ['--lr', '3e-4; touch x'] a $(b) 'c'"
    assert f"rank 0 {expected}" in done.out
    assert "rank 1" not in done.out
    logs = run("submit", "logs", "run", cwd=tmp_path).out
    assert f"==> ranks/rank1.stdout.log <==\nrank 1 {expected}" in logs


def test_a_script_that_fails_is_named_with_its_own_words(tmp_path, script):
    done = run("submit", *script, "--", "fail", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert "rank 1 failed: ValueError: as asked" in done.err
    assert "run/submit/0/ranks/rank1.stderr.log" in done.err
    assert run("submit", "status", "run", cwd=tmp_path).out.startswith("failed, exit code 1")


def read_quietly(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def until_ready(folder):
    deadline = time.monotonic() + 60
    while not all((folder / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_another_terminal_stops_a_job(tmp_path, script):
    running = start("submit", *script, "--", "wait", cwd=tmp_path)
    until_ready(tmp_path)
    assert run("submit", "status", "run", cwd=tmp_path).out.startswith("running, watched by process ")
    assert run("submit", "stop", "run", cwd=tmp_path).out == "stopped\n"
    done = running.wait(60)
    assert (done.code, done.left) == (130, ())


def test_a_job_whose_submitter_was_killed_is_lost_and_not_taken_for_another_process(tmp_path, script):
    running = start("submit", *script, "--", "wait", cwd=tmp_path)
    until_ready(tmp_path)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait().left == ()
    deadline = time.monotonic() + 60
    while left := [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in read_quietly(p / "environ")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    state = json.loads((tmp_path / "run/submit/0/state.json").read_text())
    (tmp_path / "run/submit/0/state.json").write_text(json.dumps(state | {"pid": os.getpid()}))
    assert run("submit", "status", "run", cwd=tmp_path).out.startswith("lost: ")
    assert run("submit", "stop", "run", cwd=tmp_path).out.startswith("lost: ")  # and this process lives on


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["lancher=ssh"],
            "unknown config key lancher: neither moeweave-submit nor moeweave-train has it. Did you mean",
        ),
        (["launcher=shs"], "launcher=shs: must be one of kubernetes, .*local, .*ssh"),
        (["launcher=ssh", "launcher.hostz=[a]"], "unknown config key launcher.hostz.*Did you mean launcher.hosts?"),
        (["launcher=ssh", "launcher.connect_timeout=soon"], "launcher.connect_timeout: Value 'soon'.*Integer"),
        (["stps=3"], "unknown config key stps.*Did you mean steps?"),
        (["optim.lrr=3"], "unknown config key optim.lrr.*Did you mean optim.lr?"),
        (["nodes=many"], "nodes: Value 'many'.*Integer"),
        (["program=trian"], "program=trian: must be train, bench or the path.*Did you mean program=train?"),
        (["program=no.py", "ranks_per_node=2"], "program=no.py: no such file"),
        (["program=bench"], "unknown config key .*: neither moeweave-submit nor moeweave-bench has it"),
        (["mesh.ep=3"], "must divide dp"),
        (["min_nodes=2"], "min_nodes=2: is more than nodes=1"),
        (["check=true", "interface=nosuch0"], "interface=nosuch0: has no IPv4 address here. The interfaces are"),
        (["code=copy"], "code=copy: must be one of shared, rsync"),
        (["--multirun"], "moeweave-submit takes neither"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(tmp_path, arguments, message):
    done = run("submit", *TINY, *arguments, cwd=tmp_path)
    assert (done.code, done.left) == (2, ())
    assert re.search(message.replace("?", r"\?"), done.err.replace("\n", " ")), done.err
    assert not (tmp_path / "run").exists()


def test_every_worked_command_of_the_help_shows_what_it_would_run(tmp_path):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    (tmp_path / "my.py").write_text(SCRIPT)
    for command, _ in submit.PROGRAM.examples:
        _, *words = shlex.split(command)
        place = words.index("--") if "--" in words else len(words)
        done = run("submit", *words[:place], "show=true", *words[place:], cwd=tmp_path)
        assert (done.code, done.left) == (0, ()), f"{command}\n{done.err}"
        assert "moeweave.launch." in done.out


def test_show_prints_and_leaves_nothing(tmp_path):
    hosts = ["launcher=ssh", "launcher.hosts=[10.0.0.1,10.0.0.2]"]
    done = run("submit", *TINY, *hosts, "show=true", cwd=tmp_path)
    assert done.code == 0
    assert done.out.count("bash -s") == 2
    assert "--rdzv-endpoint 10.0.0.1:" in done.out
    assert not (tmp_path / "run").exists()


def test_questions_about_what_was_never_submitted_are_refused(tmp_path):
    for what in ("status", "logs", "stop"):
        done = run("submit", what, str(tmp_path), cwd=tmp_path)
        assert done.code == 2
        assert "holds no submission" in done.err
    assert run("submit", "status", cwd=tmp_path).code == 2


# ---- whole configs and sweeps


def test_a_whole_config_repeats_a_run_and_takes_nothing_beside_it(tmp_path):
    config = run("train", *TINY, "steps=2", "--cfg", cwd=tmp_path).out
    (tmp_path / "whole.yaml").write_text(config)
    assert run("train", "--config", "whole.yaml", "--cfg", cwd=tmp_path).out == config
    done = run("train", "--config", "whole.yaml", "steps=3", cwd=tmp_path)
    assert (done.code, "is a whole config" in done.err) == (2, True)
    (tmp_path / "typo.yaml").write_text(config.replace("steps:", "step:"))
    assert "Did you mean steps?" in run("train", "--config", "typo.yaml", cwd=tmp_path).err
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.system ['touch ran']\n")
    assert run("train", "--config", "code.yaml", cwd=tmp_path).code == 2
    assert not (tmp_path / "ran").exists()


def test_a_sweep_runs_each_value_in_a_folder_of_its_own(tmp_path):
    arguments = [one for one in TINY if not one.startswith("run.dir")]
    done = run("train", "--multirun", *arguments, "steps=1", "optim.lr=1e-3,1e-2", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    configs = sorted(tmp_path.glob("multirun/*/*/*/config.yaml"))
    assert [path.parent.name for path in configs] == ["0", "1"]
    assert [("lr: 0.001" in path.read_text(), "lr: 0.01" in path.read_text()) for path in configs] == [
        (True, False),
        (False, True),
    ]
    refused = run("train", "--multirun", *arguments, "optim.lrr=1,2", cwd=tmp_path)
    assert (refused.code, "Did you mean optim.lr?" in refused.err) == (2, True)


@pytest.mark.slow
def test_a_sweep_goes_through_submitit(tmp_path):
    """submitit's own jobs, as processes of this machine: each has an interpreter of its own, and reports a failure."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    arguments = [one for one in TINY if not one.startswith("run.dir")]
    command = [sys.executable, "-m", "moeweave.launch.train", "--multirun", "hydra/launcher=submitit_local"]
    done = fresh([*command, *arguments, "steps=1", "optim.lr=1e-3,1e-2"], cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    runs = sorted(path.parent for path in tmp_path.glob("multirun/*/*/*/metrics.jsonl"))
    assert [run.name for run in runs] == ["0", "1"]
    assert "lr: 0.001" in (runs[0] / "config.yaml").read_text() and "lr: 0.01" in (runs[1] / "config.yaml").read_text()
    failed = fresh([*command, *arguments, "steps=1", "mesh.ep=3"], cwd=tmp_path)
    assert failed.code == 1
    assert "must divide dp" in failed.out + failed.err


def test_a_sweep_says_so_when_a_run_fails(tmp_path):
    done = run("train", "--multirun", *TINY, "steps=1", "mesh.ep=2,3", cwd=tmp_path)
    assert done.code == 1
    assert "must divide dp" in done.out + done.err
