"""Rounds of one-sided exchange over the windows of a group: who may write where, and when it may be read.

Every exchange is one round: each rank writes into an area of every peer's window and says so; once all peers have said
so it reads its own area into memory of its own, and tells them that the area may be written again. Ranks post rounds in
the same order. As many rounds as there are areas can be under way; a rank that posts one more first reads the oldest of
its own, so no order of waiting can lock up. All dispatchers over a group share its rounds.

Room grows with the tokens, by facts that every rank has at the same round: the largest number of tokens in the rounds
that all have read, or in the layout that is used again. A rank that has more tokens than that sends this round's rows
in memory of its own, whose descriptor goes with the message.

Legend: W ranks, T tokens of a rank.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.peers import FIRST_KIND, PeerError, Peers
from moeweave.comm.pending import Pending
from moeweave.comm.slots import later_epoch
from moeweave.comm.window_planes import NAMES
from moeweave.comm.windows import NUM_AREAS, Sizes, check_equal
from moeweave.comm.windows_cpu import SharedWindows, create_memory, map_memory

logger = logging.getLogger("moeweave")

ARRIVED, TAKEN, WINDOW, ROOM = range(FIRST_KIND, FIRST_KIND + 4)
OPERATIONS = ("dispatch", "dispatch with a known layout", "combine of sums", "combine of rows", *NAMES)
BLOCKS = len(OPERATIONS) - len(NAMES)  # where the exchanges of `window_planes` start
_HEAD = struct.Struct("<BI")  # kind, epoch
_ARRIVAL = struct.Struct("<BIBq5q")  # and operation, tokens, sizes
_TOKENS = struct.Struct("<BIq")


class AreaMap(Protocol):
    """What `windows.DispatchMap` and `windows.ReturnMap` have in common."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True)
class Place:
    """Where a source's part of a round lies: in an area, as its `source`-th."""

    area: Tensor
    map: Any
    source: int


@dataclass(frozen=True)
class Call:
    """One rank's part in a round.

    Attributes:
        operation: index into OPERATIONS.
        sizes: what all ranks must agree on.
        tokens: of this rank.
        known_tokens: of the rank with most, where a layout tells it; None in a first dispatch.
        map_of: the map of an area for a number of sources and tokens.
        write: write(peer, place) puts this rank's rows for a peer there.
        read: read(places of all sources) -> the result, in memory of its own.
    """

    operation: int
    sizes: Sizes
    tokens: int
    known_tokens: int | None
    map_of: Callable[[int, int], Any]
    write: Callable[[int, Place], None]
    read: Callable[[list[Place]], Any]


@dataclass(frozen=True)
class _Arrival:
    operation: int
    tokens: int
    sizes: Sizes
    fd: int | None


@dataclass
class _Round:
    """A round that this rank has posted: `result` once it has been read."""

    epoch: int
    call: Call | None
    windows: SharedWindows
    map: Any
    own: Place
    result: Any = None
    tokens: int = 0


class Exchange:
    """The rounds of one group.

    Args:
        group: ranks of one host; None for this rank alone. Not kept: the exchange ends with the group.
        timeout: seconds that a wait for peers may take; None takes the group's.
        first_epoch: where epochs start.
        areas: rounds that can be under way, a power of two.
        title: what errors call it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout: float | None = None,
        first_epoch: int = 0,
        areas: int = NUM_AREAS,
        title: str = "onesided",
    ) -> None:
        self.peers = Peers(group, group_timeout(group) if timeout is None else timeout, title)
        self.areas = areas
        self.room = 0
        self._epoch = first_epoch
        self._windows: SharedWindows | None = None
        before = {later_epoch(first_epoch, -step) for step in range(1, areas + 1)}
        self._taken = {peer: set(before) for peer in self.peers.others}
        self._arrived: dict[int, dict[int, _Arrival]] = {peer: {} for peer in self.peers.others}
        self._offered: dict[int, list[int]] = {peer: [] for peer in self.peers.others}
        self._rooms: dict[int, list[int]] = {peer: [] for peer in self.peers.others}
        self._rounds: dict[int, _Round] = {}
        # Waits may come from another thread than posts; rounds are read one at a time.
        self._lock = threading.RLock()
        weakref.finalize(self, Peers.close, self.peers)

    def post(self, call: Call) -> Pending[Any]:
        """Write this rank's part of the next round; `wait` of what is returned reads what the peers wrote."""
        with self._lock:
            self.peers.check()
            epoch, before = self._epoch, later_epoch(self._epoch, -self.areas)
            what = _named(call.operation, epoch)
            oldest = self._rounds.pop(before, None)
            if oldest is not None:
                self._read(oldest)
                self.room = max(self.room, oldest.tokens)
            room = self._room_for(call, what)
            area_map = call.map_of(self.peers.size, room)
            windows = self._windows_of(area_map.num_bytes, what)
            self.peers.wait(lambda: [p for p, taken in self._taken.items() if before not in taken], self._handle, what)
            for taken in self._taken.values():
                taken.discard(before)
            own = self._write(call, epoch, windows, area_map, fits=call.tokens <= room)
            self._epoch = later_epoch(epoch)
            posted = _Round(epoch, call, windows, area_map, own)
            self._rounds[epoch] = posted
            return Pending(lambda: self._finish(posted))

    def close(self) -> None:
        """Leave the group; whoever still waits for this rank gets an error."""
        self.peers.close()
        self._windows = None
        self._rounds.clear()

    def _room_for(self, call: Call, what: str) -> int:
        """Tokens that areas of this round have room for, the same on all ranks."""
        fixed = call.sizes.max_tokens
        if fixed:
            if call.tokens > fixed:
                self._refuse(
                    f"max_tokens ({fixed}) must be at least the tokens of any rank ({call.tokens} on rank "
                    f"{self.peers.rank}). Raise max_tokens, or leave it out so that windows grow"
                )
            return fixed
        if call.known_tokens is not None:
            self.room = max(self.room, call.known_tokens)
        elif self._windows is None:
            self.room = self._largest(call.tokens, what)
        return 1 << max(0, self.room - 1).bit_length()

    def _refuse(self, text: str) -> None:
        try:
            self.peers.fail(text)
        except PeerError:
            raise ValueError(f"{text}.") from None

    def _largest(self, tokens: int, what: str) -> int:
        """The largest number of any rank."""
        for peer in self.peers.others:
            self.peers.send(peer, _TOKENS.pack(ROOM, self._epoch, tokens))
        self.peers.wait(lambda: [p for p, rooms in self._rooms.items() if not rooms], self._handle, what)
        return max([tokens, *(rooms.pop(0) for rooms in self._rooms.values())])

    def _windows_of(self, area_bytes: int, what: str) -> SharedWindows:
        """Windows with areas of at least `area_bytes`. Earlier rounds keep those that they were written in."""
        num_bytes = self.areas * area_bytes
        if self._windows is not None and self._windows.num_bytes >= num_bytes:
            return self._windows
        logger.info("one-sided windows of %.1f MB a rank, %d ranks", num_bytes / 1e6, self.peers.size)
        fd, mine = create_memory(num_bytes)
        for peer in self.peers.others:
            self.peers.send(peer, _HEAD.pack(WINDOW, self._epoch), fd)
        os.close(fd)
        self.peers.wait(lambda: [p for p, fds in self._offered.items() if not fds], self._handle, what)
        memory = {peer: _map_once(fds.pop(0)) for peer, fds in self._offered.items()}
        memory[self.peers.rank] = mine
        self._windows = SharedWindows(self.peers.rank, [memory[rank] for rank in range(self.peers.size)])
        return self._windows

    def _write(self, call: Call, epoch: int, windows: SharedWindows, area_map: AreaMap, fits: bool) -> Place:
        """Write to every rank and say so; returns where this rank's rows for itself are."""
        rank = self.peers.rank
        tail = (call.operation, call.tokens, *astuple(call.sizes))
        own = Place(_area(windows, rank, epoch, self.areas), area_map, rank)
        for peer in [*self.peers.others, rank]:
            place, fd = Place(_area(windows, peer, epoch, self.areas), area_map, rank), None
            if not fits:
                alone = call.map_of(1, call.tokens)
                fd, memory = create_memory(alone.num_bytes)
                place = Place(memory, alone, 0)
            call.write(peer, place)
            if peer != rank:
                self.peers.send(peer, _ARRIVAL.pack(ARRIVED, epoch, *tail), fd)
            else:
                own = place
            if fd is not None:
                os.close(fd)
        return own

    def _finish(self, posted: _Round) -> Any:
        with self._lock:
            self._read(posted)
            result, posted.result = posted.result, None
            return result

    def _read(self, posted: _Round) -> None:
        """Wait for the peers' parts, read all, and let the area go."""
        call, epoch = posted.call, posted.epoch
        if call is None:
            return
        what = _named(call.operation, epoch)
        self.peers.wait(lambda: [p for p, here in self._arrived.items() if epoch not in here], self._handle, what)
        arrivals = {peer: here.pop(epoch) for peer, here in self._arrived.items()}
        self._compare(call, arrivals, what)
        places = [posted.own] * self.peers.size
        for peer, arrival in arrivals.items():
            if arrival.fd is None:
                places[peer] = Place(_area(posted.windows, self.peers.rank, epoch, self.areas), posted.map, peer)
            else:
                places[peer] = Place(_map_once(arrival.fd), call.map_of(1, arrival.tokens), 0)
        posted.result = call.read(places)
        posted.tokens = max([call.tokens, *(arrival.tokens for arrival in arrivals.values())])
        posted.call = None
        for peer in arrivals:
            self.peers.send(peer, _HEAD.pack(TAKEN, epoch))

    def _compare(self, call: Call, arrivals: dict[int, _Arrival], what: str) -> None:
        """Every rank must be in the same operation with the same sizes."""
        sizes = [call.sizes] * self.peers.size
        for peer, arrival in arrivals.items():
            if arrival.operation != call.operation:
                self.peers.fail(f"{what}: rank {peer} is in a {OPERATIONS[arrival.operation]}; call in the same order")
            sizes[peer] = arrival.sizes
        try:
            check_equal(call.sizes, sizes, what)
        except RuntimeError as error:
            self.peers.fail(str(error))

    def _handle(self, peer: int, message: bytes, fds: list[int]) -> None:
        kind, epoch = _HEAD.unpack_from(message)
        if kind == ARRIVED:
            _, _, operation, tokens, *sizes = _ARRIVAL.unpack(message)
            arrival = _Arrival(operation, tokens, Sizes.of(sizes), fds[0] if fds else None)
            self._arrived[peer][epoch] = arrival
        elif kind == TAKEN:
            self._taken[peer].add(epoch)
        elif kind == WINDOW:
            self._offered[peer].append(fds[0])
        else:
            self._rooms[peer].append(_TOKENS.unpack(message)[2])


def group_timeout(group: dist.ProcessGroup | None) -> float:
    """Seconds after which the operations of `group` give up."""
    if group is None:
        return 0.0
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", dist.default_pg_timeout)
    return float(timeout.total_seconds())


def _named(operation: int, epoch: int) -> str:
    return f"{OPERATIONS[operation]} (round {epoch})"


def _area(windows: SharedWindows, rank: int, epoch: int, areas: int) -> Tensor:
    size = windows.num_bytes // areas
    start = epoch % areas * size
    return windows.of(rank)[start : start + size]


def _map_once(fd: int) -> Tensor:
    try:
        return map_memory(fd)
    finally:
        os.close(fd)
