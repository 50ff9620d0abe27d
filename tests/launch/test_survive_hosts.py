"""A training over two hosts (namespaces with an sshd each) whose rank or link is lost, or whose link is slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from namespaces import TwoHosts, two_hosts
from programs import run, start

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
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def submit(hosts: TwoHosts, folder: Path, *arguments: str):
    return start("submit_cases", hosts.names[0], *TINY, "run.dir=two", *hosts.ssh_overrides(), *arguments, cwd=folder)


def steps_of(folder: Path) -> int:
    path = folder / "two/metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def until(holds, running, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.05)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def in_host(hosts: TwoHosts, command: str) -> None:
    subprocess.run(["ip", "netns", "exec", hosts.names[1], *command.split()], check=True, timeout=20)


def test_a_killed_rank_of_one_host_and_a_slow_link_cost_no_step(hosts: TwoHosts, tmp_path):
    in_host(hosts, "tc qdisc add dev eth0 root tbf rate 50mbit burst 64kb latency 400ms")
    try:
        running = submit(hosts, tmp_path, "steps=24", "max_restarts=1")
        until(lambda: steps_of(tmp_path) >= 6, running)
        beat = json.loads((tmp_path / "two/submit/0/ranks/rank3.beat").read_text())
        os.kill(beat["pid"], signal.SIGKILL)
        done = running.wait(200)
    finally:
        in_host(hosts, "tc qdisc del dev eth0 root")
    assert (done.code, done.left) == (0, ()), done.out + done.err
    assert "resume  step " in done.out
    assert run("train", *TINY, "steps=24", "run.dir=one", cwd=tmp_path).code == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def test_a_cut_link_ends_the_job_with_one_error_and_the_same_command_goes_on(hosts: TwoHosts, tmp_path):
    running = submit(hosts, tmp_path, "steps=100000", "ranks.hang_timeout=8")
    until(lambda: steps_of(tmp_path) >= 6, running)
    in_host(hosts, "ip link set eth0 down")
    try:
        done = running.wait(150)
        assert done.code == 1, done.out + done.err
        assert done.err.count("moeweave-submit: error: ") == 1
        assert "ended first" in done.err
        assert "see the other hosts, and the network between them" in done.out
        until(lambda: hosts.processes() == {}, running, 150)
    finally:
        in_host(hosts, "ip link set eth0 up")
    steps = steps_of(tmp_path) + 4
    again = submit(hosts, tmp_path, f"steps={steps}").wait(200)
    assert again.code == 0, again.out + again.err
    assert len(losses(tmp_path / "two")) == steps
