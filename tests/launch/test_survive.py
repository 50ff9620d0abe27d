"""Runs that lose an agent, hang, are told to stop, or meet a NaN: each goes on, or ends with one clear error."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from programs import run, start

TINY = [
    "model=qwen3_moe",
    "mesh.dp=2",
    "mesh.ep=2",
    "mesh.device=cpu",
    "data.seq_length=16",
    "batch_size=4",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "proof=false",
    "steps=12",
]


def metrics(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return found


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def until(holds, running, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.01)


def until_step(step: int, folder: Path, running) -> None:
    path = folder / "metrics.jsonl"
    until(lambda: path.exists() and path.read_text().count("\n") >= step, running)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[float]:
    """Losses of the same run, unbroken."""
    folder = tmp_path_factory.mktemp("whole")
    assert run("train", *TINY, "run.dir=run", cwd=folder).code == 0
    return losses(folder / "run")


# ---- ranks that hang


def stacks(folder: Path) -> dict[int, str]:
    return {rank: next((folder / "logs").glob(f"*/rank{rank}.stack.txt")).read_text() for rank in (0, 1)}


def test_a_rank_that_hangs_is_dumped_named_and_ended_and_the_run_goes_on(tmp_path, whole):
    more = ["checkpoint.every=2", "ranks.hang_timeout=8", "ranks.max_restarts=1", "run.dir=broken"]
    done = run("launch_cases", "train", "sleep_once", *TINY, *more, cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    assert "no rank here has got on for " in done.err
    assert "rank 1 hangs: nothing for " in done.err
    assert "since the checkpoint of step 2" in done.err
    assert "launch_cases.py" in stacks(tmp_path / "broken")[1]
    assert "resume  step 2 of 12" in done.out
    assert losses(tmp_path / "broken") == whole


def test_a_rank_that_is_stopped_and_answers_no_signal_ends_the_run(tmp_path):
    done = run("launch_cases", "train", "freeze_once", *TINY, "ranks.hang_timeout=4", "run.dir=run", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    (first,) = [line for line in done.err.splitlines() if line.startswith("moeweave-train: error: ")]
    assert first.startswith("moeweave-train: error: rank 1 failed: hangs: nothing for ")
    assert "the process is stopped and answers no signal" in first
    assert "forward_backward" in stacks(tmp_path / "run")[0]


# ---- SIGTERM


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, whole):
    arguments = [*TINY, "checkpoint.every=0", "run.dir=broken"]
    running = start("launch_cases", "train", "slow_steps", *arguments, cwd=tmp_path)
    until_step(3, tmp_path / "broken", running)
    os.kill(running.pid, signal.SIGTERM)
    done = running.wait(60)
    assert (done.code, done.left) == (143, ()), done.err
    assert done.err.splitlines()[-1] == "moeweave-train: error: stopped by SIGTERM"
    saved = len(metrics(tmp_path / "broken"))
    assert 3 <= saved < 12
    assert f"stop    SIGTERM: saved after step {saved} of 12" in done.out
    resumed = run("train", *arguments, cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert f"resume  step {saved} of 12" in resumed.out
    assert losses(tmp_path / "broken") == whole


def test_sigterm_during_the_last_save_ends_the_run_without_its_proof(tmp_path):
    arguments = [*TINY, "steps=2", "proof=true", "run.dir=run"]
    done = run("launch_cases", "train", "stop_in_the_last_save", *arguments, cwd=tmp_path)
    assert (done.code, done.left) == (143, ()), done.err
    assert "stop    SIGTERM: saved after step 2 of 2" in done.out
    assert not (tmp_path / "run/proof.json").exists()


# ---- NaN


def test_a_loss_that_is_no_number_stops_every_rank(tmp_path):
    done = run("launch_cases", "train", "nan_on_one_rank", *TINY, "steps=6", "run.dir=run", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert "step 3: loss " in done.err
    assert "on a rank. The run diverged." in done.err
    assert len(metrics(tmp_path / "run")) == 2


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path):
    arguments = ["launch_cases", "train", "nan_on_one_rank", *TINY, "steps=6", "on_nan=skip"]
    done = run(*arguments, "run.dir=run", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    lines = metrics(tmp_path / "run")
    assert [line.get("skipped", False) for line in lines] == [False, False, True, True, False, False]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]
    assert "skipped 2 of 6 steps" in done.out
    assert "left out, 2 in a row" in (tmp_path / "run/logs/rank1.log").read_text()
    ended = run(*arguments, "max_skips=1", "run.dir=ended", cwd=tmp_path)
    assert ended.code == 1
    assert "2 such steps in a row, more than max_skips=1" in ended.err


# ---- agents that go and come


@pytest.mark.timeout(600)
def test_a_run_goes_on_with_the_ranks_that_are_left_and_takes_new_ones(tmp_path):
    """Two agents of two ranks each; one is killed, and later replaced: 4, 2 and 4 ranks of one run."""
    program = [one for one in TINY if not one.startswith(("mesh.dp", "mesh.ep", "batch_size", "steps"))]
    program += ["mesh.dp=4", "mesh.ep=4", "batch_size=8", "steps=24", "checkpoint.every=4"]
    assert run("train", *program, "run.dir=whole", cwd=tmp_path).code == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def agent(number: int):
        words = ["--nnodes", "1:2", "--nproc-per-node", "2", "--node-rank", str(number), "--max-restarts", "3"]
        words += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "token", "--log-dir", f"logs{number}"]
        words += ["--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1", "-m", "moeweave.launch.train"]
        return start("agent_cases", "slow", *words, *program, "run.dir=broken", "ranks.elastic=true", cwd=tmp_path)

    first, second = agent(0), agent(1)
    until_step(5, tmp_path / "broken", first)
    os.kill(second.pid, signal.SIGKILL)
    assert second.wait(60).left == ()
    until(lambda: ", 2 ranks" in first.output(), first)  # the metrics may hold later steps of the four by then
    third = agent(1)
    done, also = first.wait(200), third.wait(60)
    assert (done.code, done.left) == (0, ()), done.err
    assert (also.code, also.left) == (0, ()), also.err
    assert done.out.count("resume  step ") == 2
    starts = [line for line in done.out.splitlines() if line.startswith("mesh ")]
    assert [line.split(", ")[-1] for line in starts] == ["4 ranks", "2 ranks", "4 ranks"]
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
