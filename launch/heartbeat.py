"""What a rank shows of its life: a beat at every part of a step, and its stacks when somebody asks.

The process that started the ranks (watch.py) reads the beats. A beat is a small file that is written over in place,
`rankN.beat` in the folder of the ranks' logs; SIGUSR1 writes the stacks of all threads to `rankN.stack.txt` beside it,
even while the rank waits inside a collective.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SIZE = 256  # bytes of a beat, so that a shorter one leaves nothing of the one before


@dataclass(frozen=True)
class Beat:
    """`when` is on the machine's monotonic clock; `limit` how many seconds may pass until the next, 0 for ever."""

    pid: int
    limit: float
    step: int
    doing: str
    when: float


class Heart:
    """One rank's beats; without a folder (ranks that no agent of ours started) none are written."""

    def __init__(self, folder: Path | None, rank: int, limit: float):
        self._limit, self._file = limit, -1
        if folder is None:
            return
        self._file = os.open(path_of(folder, rank), os.O_CREAT | os.O_WRONLY, 0o644)
        stacks = stacks_of(folder, rank).open("a")  # kept over restarts; stays open as long as the process lives
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)

    def beat(self, step: int, doing: str) -> None:
        """The rank has come as far as `doing` of `step`."""
        if self._file >= 0:
            beat = Beat(os.getpid(), self._limit, step, doing, time.monotonic())
            os.pwrite(self._file, json.dumps(asdict(beat)).ljust(SIZE).encode(), 0)

    def stop(self) -> None:
        """Nobody waits for this rank any more."""
        self._limit = 0
        self.beat(0, "done")


def read(folder: Path, rank: int) -> Beat | None:
    """The rank's last beat, or None where it has not begun."""
    try:
        return Beat(**json.loads(path_of(folder, rank).read_text()))
    except (OSError, ValueError):  # not there, or just being written
        return None


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.beat"


def stacks_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.stack.txt"
