"""A training over two hosts (namespaces with an sshd each) that loses a rank, an agent or the link, or has a slow one.

Each recovers or ends with one clear error, after which the same command goes on; the losses are those of a run that
nothing broke.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from namespaces import TwoHosts, two_hosts
from programs import Run, run, start

TINY = [
    "model=qwen3_moe",
    "mesh.dp=4",
    "mesh.ep=4",
    "mesh.device=cpu",
    "data.seq_length=16",
    "batch_size=8",
    "optim.lr=1e-2",
    "checkpoint.every=4",
    "plan.dispatcher=alltoall",  # which auto would take between hosts, and not on one
    "proof=false",
    "steps=32",
]
FIRST, SECOND = 0, 1
# Two ranks take their time, for the others to come back meanwhile.
SLOW_WHILE_TWO = """
import sys, time
from moeweave.launch import train, trainer
honest = trainer._step
def slow(training):
    time.sleep(training.mesh.world == 2)
    return honest(training)
trainer._step = slow
sys.exit(train.main(sys.argv[1:]))
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[float]:
    """Losses of the same run on one host, unbroken."""
    folder = tmp_path_factory.mktemp("whole")
    done = run("train", *TINY, "run.dir=run", cwd=folder)
    assert done.code == 0, done.err
    return losses(folder / "run")


def submit(hosts: TwoHosts, folder: Path, *arguments: str) -> Run:
    return start("submit_cases", hosts.names[0], *TINY, "run.dir=run", *hosts.ssh_overrides(), *arguments, cwd=folder)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def until_step(step: int, folder: Path, running: Run) -> None:
    path = folder / "run/metrics.jsonl"
    until(lambda: path.exists() and path.read_text().count("\n") >= step, running)


def until(holds, running: Run, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.05)


def in_host(hosts: TwoHosts, command: str) -> None:
    subprocess.run(["ip", "netns", "exec", hosts.names[SECOND], *command.split()], check=True, timeout=20)


def agent(hosts: TwoHosts, host: int) -> int:
    """The process id of the agent of that host."""
    words = " -m moeweave.launch.agent --nnodes"
    (found,) = [pid for pid, line in hosts.processes().items() if words in line and f"--node-rank {host} " in line]
    return found


def goes_on(hosts: TwoHosts, folder: Path, whole: list[float]) -> None:
    assert len(losses(folder / "run")) < len(whole)
    again = submit(hosts, folder).wait(200)
    assert (again.code, again.left) == (0, ()), again.out + again.err
    assert "resume  step " in again.out
    assert losses(folder / "run") == pytest.approx(whole, rel=1e-6)


def one_error(running: Run) -> str:
    """The error of a job that ends with one."""
    done = running.wait(200)
    assert (done.code, done.left) == (1, ()), done.out + done.err
    assert done.err.count("error: ") == 1, done.err
    return done.err


def test_a_killed_rank_of_one_host_and_a_slow_link_cost_no_step(hosts: TwoHosts, tmp_path, whole):
    in_host(hosts, "tc qdisc add dev eth0 root tbf rate 50mbit burst 64kb latency 400ms")
    try:
        running = submit(hosts, tmp_path, "max_restarts=1")
        until_step(6, tmp_path, running)
        beat = json.loads((tmp_path / "run/submit/0/ranks/rank3.beat").read_text())
        os.kill(beat["pid"], signal.SIGKILL)
        done = running.wait(200)
    finally:
        in_host(hosts, "tc qdisc del dev eth0 root")
    assert (done.code, done.left) == (0, ()), done.out + done.err
    assert "resume  step " in done.out
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


def test_a_host_whose_agent_is_killed_is_started_again(hosts: TwoHosts, tmp_path, whole):
    running = submit(hosts, tmp_path, "max_restarts=1")
    until_step(6, tmp_path, running)
    os.kill(agent(hosts, SECOND), signal.SIGKILL)
    done = running.wait(200)
    assert (done.code, done.left) == (0, ()), done.out + done.err
    assert done.out.count(f"starting {hosts.addresses[SECOND]} again: ") == 1
    assert done.out.count("resume  step ") == 1
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)
    assert hosts.processes() == {}


@pytest.mark.parametrize("host, options", [(SECOND, []), (FIRST, ["max_restarts=2"])])
def test_an_agent_that_nobody_starts_again_ends_the_job_with_one_error(hosts: TwoHosts, tmp_path, whole, host, options):
    """Without restarts, or the first host's, which served the rendezvous."""
    running = submit(hosts, tmp_path, *options)
    until_step(6, tmp_path, running)
    os.kill(agent(hosts, host), signal.SIGKILL)
    assert f"host {hosts.addresses[host]} ended first, with exit code " in one_error(running)
    until(lambda: hosts.processes() == {}, running, 60)
    goes_on(hosts, tmp_path, whole)


def test_a_cut_link_ends_the_job_with_one_error_and_the_same_command_goes_on(hosts: TwoHosts, tmp_path, whole):
    running = submit(hosts, tmp_path, "ranks.hang_timeout=20")
    until_step(6, tmp_path, running)
    in_host(hosts, "ip link set eth0 down")
    try:
        assert "ended first" in one_error(running)
        assert "see the other hosts, and the network between them" in running.output()
        until(lambda: hosts.processes() == {}, running, 150)  # the host that is cut off ends its own
    finally:
        in_host(hosts, "ip link set eth0 up")
    goes_on(hosts, tmp_path, whole)


def test_hosts_that_a_cut_link_parts_go_on_with_fewer_and_come_together_again(hosts: TwoHosts, tmp_path):
    """4 ranks, then the 2 of the first host, then 4: the checkpoint is read into other meshes twice.

    Other ranks add up in another order; at a large learning rate that would soon send a token to another expert.
    """
    gentle = [*TINY, "optim.lr=1e-3"]
    assert run("train", *gentle, "run.dir=whole", cwd=tmp_path).code == 0
    (tmp_path / "slow.py").write_text(SLOW_WHILE_TWO)
    options = ["program=slow.py", "cpu=true", "ranks_per_node=2", "min_nodes=1", "max_restarts=30", "run.dir=run"]
    words = [*gentle, "run.dir=run", "ranks.elastic=true", "ranks.hang_timeout=20"]
    ssh = [*hosts.ssh_overrides(), "launcher.connect_timeout=5"]
    running = start("submit_cases", hosts.names[FIRST], *options, *ssh, "--", *words, cwd=tmp_path)
    until_step(6, tmp_path, running)
    in_host(hosts, "ip link set eth0 down")
    try:
        until(lambda: "2 ranks" in running.output(), running)
    finally:
        in_host(hosts, "ip link set eth0 up")
    done = running.wait(250)
    assert (done.code, done.left) == (0, ()), done.out + done.err
    starts = [line.split(", ")[-1] for line in done.out.splitlines() if "mesh    " in line]
    # On a busy machine ranks that were only slow may have been started once more.
    assert [ranks for ranks, _ in itertools.groupby(starts)] == ["4 ranks", "2 ranks", "4 ranks"]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert hosts.processes() == {}
