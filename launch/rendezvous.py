"""Where ranks meet: torch elastic's c10d rendezvous, on one address, with a new store for each start.

torch's own stores listen on every address of the machine, and a store that outlives a restart makes restarted ranks
wait at the addresses of the ranks before them (pytorch#135712, pytorch#108158): of 5 restarts over two machines none
came back. Here both stores (the agents', and the one that ranks meet in) are bound to the address by which the others
reach this machine, rank 0's agent opens a new one for each start, and what agents read is signed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

BACKEND = "moeweave"
DEFAULT_PORT = 29400
READ_SECONDS = 60  # within which the rendezvous answers, once it has been reached, or is taken for gone


@dataclass
class Rounds:
    """How many times the ranks of this job have been started before; every agent of the job sees the same number."""

    before: int = 0


class SignedBackend(RendezvousBackend):
    """torch's backend, whose state is signed with the job's token.

    Agents unpickle the state, and a store gives its keys and values to everyone who reaches its port: without the
    signature, whoever does could run code on every host. The store sees a digest of the token, never the token.
    """

    def __init__(self, store: TCPStore, token: str) -> None:
        self._token = token.encode()
        self._inner = C10dRendezvousBackend(store, public_id(token))

    @property
    def name(self) -> str:
        return BACKEND

    def get_state(self) -> tuple[bytes, Any] | None:
        found = self._inner.get_state()
        return None if found is None else (self._opened(found[0]), found[1])

    def set_state(self, state: bytes, token: Any | None = None) -> tuple[bytes, Any, bool] | None:
        found = self._inner.set_state(self._signature(state) + state, token)
        return None if found is None else (self._opened(found[0]), *found[1:])

    def _signature(self, state: bytes) -> bytes:
        return hmac.digest(self._token, state, "sha256")

    def _opened(self, signed: bytes) -> bytes:
        signature, state = signed[:32], signed[32:]
        if not hmac.compare_digest(signature, self._signature(state)):
            raise RendezvousStateError("the rendezvous holds a state that no agent of this job wrote")
        return state


def public_id(token: str) -> str:
    """What the store may show of the job's token."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


@dataclass
class BoundRendezvous(RendezvousHandler):
    """torch's handler, but for the store that ranks meet in: it is the agent's own, new for each start, bound."""

    inner: RendezvousHandler
    store: TCPStore
    address: str
    rounds: Rounds
    ranks_store: TCPStore | None = field(default=None, init=False)

    @property
    def use_agent_store(self) -> bool:
        """Ranks join the store that rank 0's agent serves, rather than serve one themselves."""
        return True

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        info = self.inner.next_rendezvous()
        if info.rank == 0:
            self.ranks_store = listen(self.address, 0)
            started = self.store.add(f"{public_id(self.get_run_id())}/starts", 1)
            info.store.set("moeweave/ranks", f"{self.address} {self.ranks_store.port} {started - 1}")
        else:
            self.ranks_store = None
        host, port, before = info.store.get("moeweave/ranks").decode().split()
        self.rounds.before = int(before)
        return RendezvousInfo(info.store, info.rank, info.world_size, RendezvousStoreInfo(host, int(port)))

    def is_closed(self) -> bool:
        return self.inner.is_closed()

    def set_closed(self) -> None:
        self.inner.set_closed()

    def num_nodes_waiting(self) -> int:
        return self.inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self.inner.get_run_id()

    def shutdown(self) -> bool:
        return self.inner.shutdown()


def settings(is_host: bool = True, **more: Any) -> tuple[dict[str, Any], Rounds]:
    """What a LaunchConfig takes as `rdzv_configs` beside `rdzv_backend="moeweave"`, and where the starts are counted.

    `is_host`: whether this agent serves the rendezvous at the endpoint. `more`: torch's own, such as join_timeout.
    """
    rendezvous_handler_registry.register(BACKEND, _create)
    rounds = Rounds()
    return {"is_host": is_host, "rounds": rounds, **more}, rounds


def _create(parameters: RendezvousParameters) -> BoundRendezvous:
    host, port = endpoint(parameters.endpoint)
    timeout = float(parameters.get_as_int("join_timeout", 600) or 600)
    if parameters.get_as_bool("is_host"):
        address = parameters.local_addr or resolve(host, timeout)
        _refuse_loopback(address, host, parameters.max_nodes)
        store = listen(address, port)
    else:
        store = _join(host, port, timeout)
        address = parameters.local_addr or own_address(host)
    inner = create_handler(store, SignedBackend(store, parameters.run_id), parameters)
    return BoundRendezvous(inner, store, address, parameters.config["rounds"])


def endpoint(text: str) -> tuple[str, int]:
    """Host and port of `host:port`."""
    return parse_rendezvous_endpoint(text, DEFAULT_PORT)


def listen(address: str, port: int) -> TCPStore:
    """A store that is served on one address of this machine, and nowhere else. Port 0: any that is free.

    Raises OSError where the port is taken, with the remedy.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address, port))
        except OSError as error:
            raise OSError(
                f"port={port}: cannot be listened on at {address} ({error.strerror}). Free it, or set another port."
            ) from error
        server.listen(4096)
        number = server.getsockname()[1]
        store = TCPStore(address, number, is_master=True, wait_for_workers=False, master_listen_fd=server.fileno())
        server.detach()  # the store closes it
    return store


def _join(host: str, port: int, timeout: float) -> TCPStore:
    """The store of the agent that serves the rendezvous; torch asks again until it is there. Raises OSError."""
    address = resolve(host, timeout)
    try:
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        store.set_timeout(timedelta(seconds=READ_SECONDS))
        _end_with_the_network(address, port, READ_SECONDS)
        return store
    except RuntimeError as error:
        raise OSError(
            f"the rendezvous at {host}:{port} did not answer in {timeout:.0f} s. "
            "See whether the first host's agent runs and whether a firewall closes the port."
        ) from error


def _end_with_the_network(address: str, port: int, seconds: int) -> None:
    """The kernel ends this process's connections to there once the other side has been silent for so long (Linux).

    torch's store waits for answers without a limit of its own, and TCP's is about 15 minutes: so long would the agent
    of a host that is cut off hang, and hold its accelerators.
    """
    if sys.platform != "linux":
        return
    for path in Path("/proc/self/fd").iterdir():  # torch keeps the socket to itself
        with suppress(OSError):
            if not path.is_socket():
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                host, number, *_ = connection.getpeername()
                if (host.removeprefix("::ffff:"), number) == (address, port):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds // 2)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds // 6)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def resolve(host: str, timeout: float) -> str:
    """The address of `host`, asked for until `timeout`: names of pods come after the pods. Raises OSError."""
    deadline = time.monotonic() + timeout
    while (address := _address(host)) is None:
        if time.monotonic() > deadline:
            raise OSError(f"{host}: no such host. Correct its name, or name it by its address.")
        time.sleep(1)
    return address


def _address(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror:
        return None


def own_address(host: str) -> str:
    """The address of this machine by which it reaches `host`. No packet is sent."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has the IPv4 address, or None where that cannot be told."""
    for _, name in socket.if_nameindex():
        with suppress(OSError):
            if address_of(name) == address:
                return name
    return None


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface (Linux). Raises OSError with the interfaces that there are."""
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer: Any = fcntl.ioctl(probe.fileno(), get_address, interface.encode()[:15].ljust(40, b"\0"))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise OSError(f"interface={interface}: has no IPv4 address here. The interfaces are {names}.") from error
    return socket.inet_ntoa(answer[20:24])


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _refuse_loopback(address: str, host: str, max_nodes: int) -> None:
    if max_nodes > 1 and _is_loopback(address) and host != "localhost" and not _is_loopback(host):
        raise OSError(
            f"{host} is {address} on this machine, where no other host can reach it. Set interface=<the network "
            "interface that the hosts share>, or name the host by its address."
        )
