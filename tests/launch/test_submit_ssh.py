"""launcher=ssh for real: two hosts with an sshd each, as network namespaces of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
    "steps=4",
    "proof=false",
]
SCRIPT = """
import os, sys, time
rank = os.environ["RANK"]
print("rank", rank, "on", os.environ["GLOO_SOCKET_IFNAME"], flush=True)
open(f"ready{rank}", "w").close()
if sys.argv[1] == "fail" and rank == "3":
    raise ValueError("as asked")
if sys.argv[1] != "end":
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture
def script(hosts, tmp_path):
    (tmp_path / "my.py").write_text(SCRIPT)
    return ["submit_cases", hosts.names[0], "program=my.py", "ranks_per_node=2", "run.dir=run", *hosts.ssh_overrides()]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def until(holds, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def all_ready(folder: Path) -> bool:
    return all((folder / f"ready{rank}").exists() for rank in range(4))


def test_a_model_trains_over_two_hosts_as_on_one_and_listens_only_between_them(hosts: TwoHosts, tmp_path):
    running = start("submit_cases", hosts.names[0], *TINY, "run.dir=two", *hosts.ssh_overrides(), cwd=tmp_path)
    listeners: set[tuple[str, int]] = set()
    ends = [tmp_path / "two/metrics.jsonl", tmp_path / "two/submit/0/result.json"]
    until(lambda: listeners.update(hosts.listeners()) or any(path.exists() for path in ends), 200)
    listeners |= hosts.listeners()
    done = running.wait(120)
    assert (done.code, done.left) == (0, ()), done.out + done.err
    assert f"{hosts.addresses[0]} | loss " in done.out
    assert hosts.processes() == {}
    # sshd, the rendezvous, the ranks' store and gloo: at the hosts' own addresses, and nowhere else.
    assert {address for address, _ in listeners} == set(hosts.addresses)
    assert len([address for address, port in listeners if port != 2222]) > 4
    assert run("train", *TINY, "run.dir=one", cwd=tmp_path).code == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert run("submit", "status", "two", cwd=tmp_path).out.startswith("done at ")
    assert "loss " in (tmp_path / f"two/submit/0/{hosts.addresses[0]}.log").read_text()


def test_a_host_that_cannot_be_reached_is_named_soon(hosts: TwoHosts, tmp_path, script):
    started = time.monotonic()
    arguments = [one.replace(hosts.addresses[1], "10.77.0.9") for one in script]
    done = run(*arguments, "--", "end", cwd=tmp_path)
    assert time.monotonic() - started < 30
    assert (done.code, done.left) == (2, ())
    assert "host 10.77.0.9 cannot be reached: " in done.err
    assert "See that this works without a password: ssh " in done.err
    until(lambda: hosts.processes() == {}, 20)


def test_a_host_whose_key_is_not_known_is_refused(hosts: TwoHosts, tmp_path, script):
    arguments = [one.replace("known_hosts", "no_known_hosts") for one in script]
    done = run(*arguments, "--", "end", cwd=tmp_path)
    assert done.code == 2
    assert "Host key verification failed" in done.err


@pytest.mark.slow
def test_the_check_names_what_each_host_lacks(hosts: TwoHosts, tmp_path, script):
    done = run(*script, "check=true", "setup=/nowhere/setup.sh", "interface=eth7", "--", "end", cwd=tmp_path)
    assert done.code == 2
    for address in hosts.addresses:
        assert f"{address} has no /nowhere/setup.sh" in done.err or f"{address} cannot run the check" in done.err
    assert not (tmp_path / "run").exists()
    sent = run(*script, "check=true", "interface=eth0", "--", "end", cwd=tmp_path)
    assert (sent.code, sent.left) == (2, ())
    assert "accelerators and needs 2" in sent.err  # a script that says nothing of a device gets one a rank


def test_a_rank_that_fails_ends_all_hosts_and_is_named_with_its_host(hosts: TwoHosts, tmp_path, script):
    done = run(*script, "cpu=true", "--", "fail", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert f"{hosts.addresses[1]} | rank 3 failed: ValueError: as asked" in done.out
    assert f"host {hosts.addresses[1]} ended first, with exit code 1" in done.err
    assert hosts.processes() == {}


@pytest.mark.parametrize(
    "how", [signal.SIGINT, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGKILL))]
)
def test_all_hosts_end_with_the_submitter(hosts: TwoHosts, tmp_path, script, how):
    running = start(*script, "--", "wait", cwd=tmp_path)
    until(lambda: all_ready(tmp_path))
    os.kill(running.pid, how)
    done = running.wait(60)
    assert done.code == {signal.SIGINT: 130}.get(how, -how)
    until(lambda: hosts.processes() == {}, 40)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("rsync") is None, reason="this machine has no rsync")
def test_code_and_config_are_copied(hosts: TwoHosts, tmp_path, script):
    """Both hosts have this machine's files, so what is seen is that rsync takes the command and changes nothing."""
    (tmp_path / "code").mkdir()
    done = run(
        *script, "code=rsync", f"code_dir={tmp_path}/code", f"env.PYTHONPATH={os.getcwd()}", "--", "end", cwd=tmp_path
    )
    assert (done.code, done.left) == (0, ()), done.out + done.err
    assert (tmp_path / "my.py").read_text() == SCRIPT
