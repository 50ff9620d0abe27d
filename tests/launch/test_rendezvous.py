"""Where ranks meet: on one address only, anew at each start, with the same count on every host."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousStateError

from moeweave.launch import rendezvous
from programs import start

SCRIPT = """
import json, os, sys, time
rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
keys = ["MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"]
with open(f"start{restarts}-rank{rank}", "w") as file:
    json.dump({key: os.environ[key] for key in keys}, file)
if restarts == "0":
    sys.exit(3) if rank == "1" else time.sleep(60)  # which its agent ends
"""


def listening(port: int) -> set[str]:
    """Addresses, as the kernel writes them, on which this machine listens at that port."""
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    local = [line.split()[1].split(":") for line in lines if line.split()[3] == "0A"]
    return {address for address, number in local if int(number, 16) == port}


def test_a_store_listens_on_its_address_alone():
    store = rendezvous.listen("127.0.0.1", 0)
    assert listening(store.port) == {"0100007F"}
    store.set("a", "b")
    assert store.get("a") == b"b"


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port={port}: cannot be listened on at 127.0.0.1 .*set another port"):
            rendezvous.listen("127.0.0.1", port)


@pytest.mark.skipif(sys.platform != "linux", reason="by a setting of Linux")
def test_a_host_that_is_cut_off_does_not_wait_for_ever():
    """The far end may never answer: the kernel then ends the connection (tests of two hosts cut the link)."""
    server = rendezvous.listen("127.0.0.1", 0)
    joined = rendezvous._join("127.0.0.1", server.port, timeout=20)
    joined.set("a", "b")
    limits = [
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        for connection in sockets_of_this_process()
        if peer_port(connection) == server.port and connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    ]
    assert limits and set(limits) == {rendezvous.READ_SECONDS * 1000}


def sockets_of_this_process() -> Iterator[socket.socket]:
    for path in Path("/proc/self/fd").iterdir():
        if path.is_socket():
            with socket.socket(fileno=os.dup(int(path.name))) as found:
                yield found


def peer_port(connection: socket.socket) -> int | None:
    try:
        return connection.getpeername()[1]
    except (OSError, IndexError):
        return None


def test_a_state_that_the_job_did_not_write_is_never_unpickled():
    store = rendezvous.listen("127.0.0.1", 0)
    ours, same = (rendezvous.SignedBackend(store, "token") for _ in range(2))
    state, mark, written = ours.set_state(b"state")
    assert (state, written) == (b"state", True)
    assert same.get_state()[0] == b"state"
    assert same.set_state(b"next", mark)[::2] == (b"next", True)
    assert ours.set_state(b"late", mark)[::2] == (b"next", False)  # torch's compare and set goes through
    assert not [key for key in store.list_keys() if "token" in key]
    forger = rendezvous.C10dRendezvousBackend(store, rendezvous.public_id("token"))
    assert forger.set_state(b"forged" * 10, forger.get_state()[1])[2]
    with pytest.raises(RendezvousStateError, match="no agent of this job wrote"):
        ours.get_state()


def test_addresses_and_interfaces_belong_together():
    assert rendezvous.address_of("lo") == "127.0.0.1"
    assert rendezvous.interface_of("127.0.0.1") == "lo"
    assert rendezvous.interface_of("192.0.2.1") is None
    assert rendezvous.own_address("127.0.0.1") == "127.0.0.1"
    with pytest.raises(OSError, match=r"interface=nosuch0: has no IPv4 address here. The interfaces are .*lo"):
        rendezvous.address_of("nosuch0")
    with pytest.raises(OSError, match=r"no-such-host\.invalid: no such host"):
        rendezvous.resolve("no-such-host.invalid", timeout=0)


def test_two_agents_start_again_in_a_new_store_and_count_alike(tmp_path):
    """Rank 1 fails at the first start: every rank is started again, and each start has a store of its own."""
    (tmp_path / "my.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1", "--log-dir", "logs"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{port}", "my.py"]
    agents = [
        start("moeweave.launch.agent", *options, cwd=tmp_path, PET_RDZV_ID="secret", PET_NODE_RANK=str(number))
        for number in range(2)
    ]
    ends = [agent.wait(60) for agent in agents]
    assert [(done.code, done.left) for done in ends] == [(0, ()), (0, ())], [done.err for done in ends]
    starts = [
        [json.loads((tmp_path / f"start{number}-rank{rank}").read_text()) for rank in range(2)] for number in range(2)
    ]
    for first, second in starts:
        assert first == second
        assert (first["MASTER_ADDR"], first["WORLD_SIZE"]) == ("127.0.0.1", "2")
        assert (first["TORCHELASTIC_USE_AGENT_STORE"], first["TORCHELASTIC_RUN_ID"]) == ("True", "secret")
    assert starts[0][0]["MASTER_PORT"] != starts[1][0]["MASTER_PORT"]
    assert not list(tmp_path.glob("start2-*"))
