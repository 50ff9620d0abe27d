"""Streams beside the one that computes: `push` and `dma`, the two planes of communication.

    device   a stream a plane; events order it after what it reads and before who joins it; the host never waits
    cpu      compute is the caller's thread; push posts asynchronous work; dma runs on a helper thread of its own

Every exchange on a plane is issued in program order, so that all ranks issue the same. Nothing here changes a result.

Lifetime on a device: what a plane allocates is freed into that plane's stream, which waits for the compute stream
before its next work, so reuse is ordered after every reader without marking tensors (`record_stream`), which graphs do
not allow. What a plane reads is held by its Pending until it is joined.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from moeweave.comm.pending import Pending
from moeweave.comm.timeline import Timeline

T = TypeVar("T")
Post = Callable[[], Pending[T]]  # starts an exchange; what it returns waits for it


class Streams(Protocol):
    """Where exchanges run."""

    timeline: Timeline | None

    def start(self, plane: str, name: str, post: Callable[[], Pending[T]]) -> Pending[T]:
        """Run an exchange on a plane, after what the caller has computed so far; `wait` joins it to the caller."""

    def close(self) -> None:
        """End helper threads. No exchange may be under way."""


def make_streams(
    device: torch.device | str, *, overlap: bool = True, timeline: Timeline | None = None
) -> HostStreams | DeviceStreams | OneStream:
    """Streams for a device; without `overlap` every exchange ends before the caller goes on."""
    device = torch.device(device)
    if not overlap:
        return OneStream(timeline)
    return HostStreams(timeline) if device.type == "cpu" else DeviceStreams(device, timeline)


class OneStream:
    """One after the other, on the caller's stream: what overlapped schedules are compared with."""

    def __init__(self, timeline: Timeline | None = None) -> None:
        self.timeline = timeline

    def start(self, plane: str, name: str, post: Callable[[], Pending[T]]) -> Pending[T]:
        return Pending.ready(_timed(self.timeline, plane, name, post))

    def close(self) -> None:
        return None


class HostStreams:
    """A CPU rank's planes."""

    def __init__(self, timeline: Timeline | None = None) -> None:
        self.timeline = timeline
        # Its thread starts with the first exchange, and ends with `close` or with this object.
        self._helper = ThreadPoolExecutor(1, "dma")

    def start(self, plane: str, name: str, post: Callable[[], Pending[T]]) -> Pending[T]:
        if plane == "dma":
            return Pending(self._helper.submit(_timed, self.timeline, plane, name, post).result)
        start = None if self.timeline is None else self.timeline.now()
        pending = post()

        def finish() -> T:
            result = pending.wait()
            if self.timeline is not None:
                self.timeline.add(plane, name, start, self.timeline.now())
            return result

        return Pending(finish)

    def close(self) -> None:
        self._helper.shutdown()


class DeviceStreams:
    """A CUDA or NPU rank's planes."""

    def __init__(self, device: torch.device, timeline: Timeline | None = None) -> None:
        self.timeline = timeline
        self._module: Any = torch.get_device_module(device)
        self._streams = {plane: self._module.Stream(device=device) for plane in ("push", "dma")}

    def start(self, plane: str, name: str, post: Callable[[], Pending[T]]) -> Pending[T]:
        stream = self._streams[plane]
        stream.wait_stream(self._module.current_stream())
        with self._module.stream(stream):
            result = _timed(self.timeline, plane, name, post)
            done = stream.record_event()

        def finish(held: Callable[[], Pending[T]] = post) -> T:
            self._module.current_stream().wait_event(done)
            return result

        return Pending(finish)

    def close(self) -> None:
        return None


@torch.no_grad()
def _timed(timeline: Timeline | None, plane: str, name: str, post: Callable[[], Pending[T]]) -> T:
    start = None if timeline is None else timeline.now()
    result = post().wait()
    if timeline is not None:
        timeline.add(plane, name, start, timeline.now())
    return result
