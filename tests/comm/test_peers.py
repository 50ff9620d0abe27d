"""Ranks that die, stop or leave during a one-sided exchange: the others get an error that names rank, operation and
wait,
within the deadline, and nothing is left. The ranks are processes of their own, without a launcher that would end them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moeweave.comm import engines
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.engines import shares_memory
from moeweave.comm.peers import Peers
from plain_moe import Case, ids_of, tokens_of, weights_of
from run_ranks import _start_server, run_ranks

CASE = Case((5, 17, 9), routing="holes", num_experts=12)


def rank_main(rank: int, folder: str, timeout: float, fate: str, pipe: connection.Connection) -> None:
    """One rank's life: two whole steps, then steps until an error, which is sent back with the seconds that it took."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), CASE.world)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=CASE.world, timeout=limit)
    dispatcher = make_dispatcher("onesided", dist.group.WORLD, CASE.num_experts)
    given = tokens_of(CASE, rank), ids_of(CASE, rank), weights_of(CASE, rank)

    def step() -> None:
        dispatched = dispatcher.dispatch(*given)
        dispatcher.combine(dispatched.rows_RD, given[2], dispatched)

    for _ in range(2):
        step()
    dist.barrier()  # nobody is still in a whole step when rank 0 meets its fate
    pipe.send("ready")
    start = time.monotonic()
    if rank == 0 and fate != "alive":
        meet(fate)
    try:
        while time.monotonic() < start + 60:
            step()
            time.sleep(0.01 if fate == "alive" else 0)
    except RuntimeError as error:
        pipe.send((time.monotonic() - start, f"{type(error).__name__}: {error}"))
    pipe.recv()  # stays until the test has its answer: an end of this rank would be news for the others


def meet(fate: str) -> None:
    """What rank 0 does in the middle of a dispatch: between the message to its first peer and that to its second."""
    _, engine = engines.engine_of(dist.group.WORLD)
    peers: Peers = engine.exchange.peers  # type: ignore[attr-defined]
    send, sent = peers.send, []

    def interrupted(peer: int, message: bytes, fd: int | None = None) -> None:
        if sent:
            if fate == "leaves":
                peers.close()
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL if fate == "dies" else signal.SIGSTOP)
        sent.append(peer)
        send(peer, message, fd)

    peers.send = interrupted  # type: ignore[method-assign]


class Ranks:
    """The processes of `rank_main`, each at the end of a pipe."""

    def __init__(self, folder: Path, timeout: float, fate: str) -> None:
        _start_server()
        context = multiprocessing.get_context("forkserver")
        self.processes: list[BaseProcess] = []
        self.pipes: list[connection.Connection] = []
        for rank in range(CASE.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_main, args=(rank, str(folder), timeout, fate, theirs))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def answers(self, ranks: list[int]) -> list[Any]:
        for rank in ranks:
            assert self.pipes[rank].poll(60), f"rank {rank} says nothing"
        return [self.pipes[rank].recv() for rank in ranks]

    def kill(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join(10)
            pipe.close()


@pytest.fixture
def ranks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    started = Ranks(tmp_path, *request.param)
    try:
        assert started.answers([0, 1, 2]) == ["ready"] * 3
        yield started
    finally:
        started.kill()


@pytest.mark.parametrize("ranks", [(10.0, "dies")], indirect=True)
def test_a_rank_killed_in_a_dispatch_is_an_error_at_once(ranks: Ranks) -> None:
    for seconds, text in ranks.answers([1, 2]):
        assert seconds < 5, "the end of a file does not wait for the deadline of 10 s"
        assert text.startswith("PeerError: onesided, rank ")
        assert "rank 0 died, after " in text
        assert "dispatch (round 4)" in text or "combine of sums (round 5)" in text


@pytest.mark.parametrize("ranks", [(5.0, "stops")], indirect=True)
def test_a_rank_that_stops_is_an_error_at_the_deadline(ranks: Ranks) -> None:
    answers = ranks.answers([1, 2])
    assert any("rank 0 did not answer within 5 s" in text for _, text in answers)
    for seconds, text in answers:
        assert 4.5 < seconds < 30
        assert "rank 0" in text
        assert "dispatch (round 4)" in text or "combine of sums (round 5)" in text


@pytest.mark.parametrize("ranks", [(10.0, "leaves")], indirect=True)
def test_a_rank_that_leaves_is_an_error_at_once(ranks: Ranks) -> None:
    for seconds, text in ranks.answers([1, 2]):
        assert seconds < 5
        assert "rank 0 has left" in text


def shared_files() -> set[str]:
    """Of ours, but for the logs of programs that other tests run meanwhile."""
    found = {path for folder in ("/dev/shm", "/tmp") for path in Path(folder).iterdir() if "moeweave" in path.name}
    return {str(path) for path in found if not path.name.startswith("moeweave-bench-")}


def unix_sockets() -> set[str]:
    """Inodes of all Unix sockets of this network namespace."""
    return {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}


@pytest.mark.parametrize("ranks", [(10.0, "alive")], indirect=True)
def test_nothing_is_left_after_a_kill(ranks: Ranks, tmp_path: Path) -> None:
    pids = [process.pid for process in ranks.processes]
    assert all("memfd:moeweave-window" in Path(f"/proc/{pid}/maps").read_text() for pid in pids), "windows are in use"
    links = [str(fd.readlink()) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
    sockets = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
    assert len(sockets & unix_sockets()) >= 2 * CASE.world
    assert not shared_files()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    ranks.kill()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not sockets & unix_sockets()
    assert not shared_files()


def forked_child() -> list[Any]:
    """A child made by fork, as a loader of data is, outlives its rank's windows: the peer still sees their end."""
    group = dist.new_group(timeout=timedelta(seconds=20))
    peers = Peers(group, 20.0)
    here, there = socket.socketpair()
    if dist.get_rank() == 1:
        dist.barrier()
        start = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            peers.wait(lambda: [0], lambda *_: None, "test")
        return [time.monotonic() - start, str(caught.value)]
    child = os.fork()
    if child == 0:
        there.close()
        here.recv(1)
        os._exit(0)
    here.close()
    dist.barrier()
    for each in list(peers._sockets.values()):
        each.close()  # as the end of this process would
    time.sleep(1)
    alive = os.waitpid(child, os.WNOHANG) == (0, 0)
    there.close()
    os.waitpid(child, 0)
    return [alive]


def test_a_forked_child_does_not_hold_the_sockets_of_its_rank() -> None:
    (alive,), (seconds, text) = run_ranks(2, forked_child, fresh=True)
    assert alive, "the child was there while the peer waited"
    assert seconds < 5
    assert "rank 0 died" in text


def apart() -> tuple[str, bool]:
    """Rank 1 says that it is on another host."""
    from moeweave.comm import nodes, peers

    if dist.get_rank():
        nodes.host_name = peers.host_name = lambda: "elsewhere"
    with pytest.raises(RuntimeError) as caught:
        make_dispatcher("onesided", dist.new_group(), 8)
    assert dist.group.WORLD is not None
    return str(caught.value), shares_memory(dist.group.WORLD)


def test_ranks_on_two_hosts_are_refused() -> None:
    reason = "rank 1 is on another host, or in another network namespace, than rank 0"
    for text, shared in run_ranks(2, apart, fresh=True):
        assert not shared
        assert f"one host: {reason}. Use dispatcher='alltoall', 'allgather' or 'hierarchical'." in text
