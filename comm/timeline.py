"""What ran when, on which stream: spans for tests of order, for pictures and for Chrome traces.

A span's two ends are marked where the work is issued: host clock readings on a CPU, events on the current stream of a
device, which `spans` turns into seconds once the device is done. Marking adds no synchronisation.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

STREAMS = ("compute", "push", "dma")


@dataclass(frozen=True)
class Span:
    """Seconds since the timeline began."""

    stream: str
    name: str
    start: float
    end: float


class Timeline:
    """Collects spans of one rank; safe to mark from several threads."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._marks: list[tuple[str, str, Any, Any]] = []
        self._lock = threading.Lock()
        self._zero = self.now()

    def now(self) -> Any:
        """The present: seconds, or an event on the current stream."""
        if self.device.type == "cpu":
            return time.perf_counter()
        module: Any = torch.get_device_module(self.device)
        event = module.Event(enable_timing=True)
        event.record()
        return event

    def add(self, stream: str, name: str, start: Any, end: Any) -> None:
        """A span between two earlier values of `now`."""
        with self._lock:
            self._marks.append((stream, name, start, end))

    @contextmanager
    def span(self, stream: str, name: str) -> Iterator[None]:
        """What the block issues is a span."""
        start = self.now()
        yield
        self.add(stream, name, start, self.now())

    def spans(self) -> list[Span]:
        """All spans by start. Waits for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        found = [
            Span(stream, name, self._seconds(start), self._seconds(end)) for stream, name, start, end in self._marks
        ]
        return sorted(found, key=lambda span: (span.start, span.end))

    def _seconds(self, mark: Any) -> float:
        return mark - self._zero if self.device.type == "cpu" else self._zero.elapsed_time(mark) / 1e3


def exposed(spans: list[Span]) -> float:
    """Seconds in which some communication is under way and no computation."""
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    total = 0.0
    for start, end in pairwise(edges):
        busy = {span.stream for span in spans if span.start <= start and span.end >= end}
        if busy and "compute" not in busy:
            total += end - start
    return total


def write_chrome_trace(spans: list[Span], path: Path, rank: int = 0) -> None:
    """A file for chrome://tracing or Perfetto, a row a stream."""
    rows = [
        dict(name=span.name, ph="X", pid=rank, tid=span.stream, ts=span.start * 1e6, dur=(span.end - span.start) * 1e6)
        for span in spans
    ]
    path.write_text(json.dumps({"traceEvents": rows}))
