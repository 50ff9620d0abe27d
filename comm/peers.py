"""Messages between the ranks of a group on one host: a Unix socket a pair, descriptors included.

A message says that rows lie in a window, or that a window may be written again: the kernel orders it after the writes
before it, which Python could not. A waiting rank sleeps in `poll`, it does not spin. The end of a peer's file means
that it died, and is an error at once; a peer that is only late is one after the deadline.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

MESSAGE_BYTES = 8192
_HELLO = struct.Struct("<i16s")
# The first byte of a message; what follows is its sender's.
FAILED, CLOSED = 0, 1
FIRST_KIND = 2  # of the messages that `wait` hands over

Handle = Callable[[int, bytes, list[int]], None]


class PeerError(RuntimeError):
    """A rank died, is late, or disagrees. What was under way on this group is lost."""


class Peers:
    """Sockets to the other ranks of `group`; made by all of them together.

    Args:
        group: ranks of one host; None for this rank alone.
        timeout: seconds that `wait` waits at most.
        title: what errors call it.

    Raises:
        RuntimeError: ranks on several hosts, or in several network namespaces.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, title: str = "onesided") -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.timeout, self.title = timeout, title
        self.error: str | None = None
        self._closed_peers: set[int] = set()
        self._sockets = {} if group is None or self.size == 1 else _connect(group, self.rank, timeout)
        self._ranks = {each.fileno(): rank for rank, each in self._sockets.items()}
        self._poll = select.poll()
        for each in self._sockets.values():
            each.setblocking(False)
            self._poll.register(each, select.POLLIN)
        _forget_in_forked_children().add(self)

    @property
    def others(self) -> list[int]:
        """The other ranks, from the next one on: ranks that send to all start with different ones."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def send(self, peer: int, message: bytes, fd: int | None = None) -> None:
        """Post a message; `fd` arrives as a descriptor of the peer's own. To a peer that is gone it is lost without a
        word: what that peer said last is for `wait` to read, and a wait for it is where the error belongs."""
        if peer not in self._sockets:
            return
        try:
            socket.send_fds(self._sockets[peer], [message], [] if fd is None else [fd], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except BlockingIOError:
            self.fail(f"rank {peer} does not read its messages")

    def wait(self, missing: Callable[[], Collection[int]], handle: Handle, what: str) -> None:
        """Hand every message to `handle(rank, message, fds)` until `missing()` names no rank.

        Raises:
            PeerError: a rank died or reports an error, or those missing did not answer in time. All later calls raise.
        """
        self.check()
        start = time.monotonic()
        while late := missing():
            for rank in sorted(self._closed_peers.intersection(late)):
                self.fail(f"{what}: rank {rank} has left")
            remaining = start + self.timeout - time.monotonic()
            ready = self._poll.poll(max(0.0, remaining) * 1000) if remaining > 0 else []
            if not ready and remaining <= 0:
                ranks = ", ".join(map(str, sorted(late)))
                self.fail(f"{what}: rank {ranks} did not answer within {self.timeout:g} s")
            for fd, _ in ready:
                self._receive(self._ranks[fd], handle, what, start)

    def check(self) -> None:
        """Raise PeerError if an earlier call failed, or the sockets were closed."""
        if self.error is not None:
            raise PeerError(self.error)

    def fail(self, text: str) -> None:
        """Tell the peers, close, and raise PeerError."""
        self.error = f"{self.title}, rank {self.rank} of {self.size}: {text}. Restart the ranks of this group."
        for peer in self._sockets:
            with contextlib.suppress(OSError):
                self._sockets[peer].send(bytes([FAILED]) + text.encode()[: MESSAGE_BYTES - 1], socket.MSG_NOSIGNAL)
        self._drop()
        raise PeerError(self.error)

    def close(self) -> None:
        """Say good-bye to the peers, and close; whoever still waits for this rank gets an error."""
        if self.error is None:
            self.error = f"{self.title}: the windows of this group were closed."
        for each in self._sockets.values():
            with contextlib.suppress(OSError):
                each.send(bytes([CLOSED]), socket.MSG_NOSIGNAL)
        self._drop()

    def _receive(self, rank: int, handle: Handle, what: str, start: float) -> None:
        """Every message of a rank that is here."""
        while rank in self._sockets:
            try:
                message, fds, _, _ = socket.recv_fds(self._sockets[rank], MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # said once; the peer's last messages come after it, then the end of the file
            if not message:
                self._hang_up(rank)
                if rank not in self._closed_peers:
                    self.fail(f"{what}: rank {rank} died, after {time.monotonic() - start:.1f} s of waiting")
            elif message[0] == FAILED:
                self.fail(f"{what}: rank {rank} reports: {message[1:].decode(errors='replace')}")
            elif message[0] == CLOSED:
                self._closed_peers.add(rank)
            else:
                handle(rank, message, fds)

    def _hang_up(self, rank: int) -> None:
        closed = self._sockets.pop(rank)
        self._poll.unregister(closed)
        closed.close()

    def _drop(self) -> None:
        for rank in list(self._sockets):
            self._hang_up(rank)


def host_name() -> str:
    """The same for two processes that can reach each other by abstract sockets: kernel and network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


def _why_apart(hosts: list[str | None]) -> str | None:
    for rank, host in enumerate(hosts):
        if host is None:
            return f"rank {rank} has no /proc of Linux"
        if host != hosts[0]:
            return f"rank {rank} is on another host, or in another network namespace, than rank 0"
    return None


def _connect(group: dist.ProcessGroup, rank: int, timeout: float) -> dict[int, socket.socket]:
    """One connection to each other rank: to lower ranks by `connect`, from higher ones by `accept`."""
    name, secret = b"\0moeweave-" + secrets.token_hex(16).encode(), secrets.token_bytes(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen(dist.get_world_size(group))
        facts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(facts, (host_name(), name, secret), group=group)
        reason = _why_apart([host for host, *_ in facts])
        if reason is not None:
            raise RuntimeError(
                f"dispatcher ('onesided') needs all ranks of a CPU group on one host: {reason}. "
                "Use dispatcher='alltoall', 'allgather' or 'hierarchical'."
            )
        sockets = {}
        for peer in range(rank):
            sockets[peer] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sockets[peer].settimeout(timeout)
            sockets[peer].connect(facts[peer][1])
            sockets[peer].send(_HELLO.pack(rank, facts[peer][2]))
        deadline = time.monotonic() + timeout
        while len(sockets) < len(facts) - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            connected, _ = listener.accept()
            connected.settimeout(max(0.001, deadline - time.monotonic()))
            hello = connected.recv(_HELLO.size)
            peer, shown = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (-1, b"")
            if secrets.compare_digest(shown, secret):
                sockets[peer] = connected
            else:
                connected.close()  # a stranger: the names of abstract sockets are public
    return sockets


@functools.cache
def _forget_in_forked_children() -> weakref.WeakSet[Peers]:
    """Every open `Peers`. A child made by fork closes its copies: they would keep a dead rank's sockets open."""
    peers: weakref.WeakSet[Peers] = weakref.WeakSet()

    def forget() -> None:
        for each in list(peers):
            each.error = f"{each.title}: the windows of this group belong to the process that this one was forked from."
            each._drop()

    os.register_at_fork(after_in_child=forget)
    return peers
