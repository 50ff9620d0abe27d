"""Finds ranks that hang, from the process that started them: dumps every rank's stacks, names who hangs, ends it.

Ranks of a job wait for each other, so when one stops none of this machine beats any more (heartbeat.py). Then all are
asked for their stacks. A rank that answers no signal (stopped by a debugger, say), or else one that is not inside a
collective, holds up the others. Where all wait, somebody on another host does, or the network: its agent gets time to
find that, before the ranks here are ended too. What ends leaves a record, as a rank that raised; torch elastic then
restarts the ranks or ends the job.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from moeweave.launch import failure, heartbeat

# The innermost Python frames of a rank that waits for another one.
_FILES = "distributed/distributed_c10d|distributed/c10d_logger|distributed/_functional_collectives|_ops|autograd/graph"
WAITING = re.compile(rf'torch/({_FILES})\.py"')
FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)')
ANSWER_SECONDS = 2.0  # within which a rank that lives has written its stacks


@dataclass
class Watch:
    """The ranks that this process started last; `ranks` is replaced at every start.

    Attributes:
        folder: of beats and stacks.
        ranks: their numbers in the job.
    """

    folder: Path
    ranks: tuple[int, ...] = ()
    _warned: float = field(default=0.0, init=False)

    def look(self) -> None:
        """Ends what hangs, if something does."""
        beats = {rank: beat for rank in self.ranks if (beat := heartbeat.read(self.folder, rank)) is not None}
        if len(beats) < len(self.ranks) or not beats or any(beat.limit <= 0 for beat in beats.values()):
            return
        newest, limit = max(beat.when for beat in beats.values()), max(beat.limit for beat in beats.values())
        quiet = time.monotonic() - newest
        if quiet < limit or (self._warned == newest and quiet < 1.5 * limit + 5):
            return
        stacks = self._stacks(beats)
        if any(beat.when > newest for rank in beats if (beat := heartbeat.read(self.folder, rank)) is not None):
            return  # they went on just now
        silent = [rank for rank in beats if not stacks[rank]]
        busy = [rank for rank in beats if stacks[rank] and not waits(stacks[rank])]
        guilty = silent or (busy if len(busy) < len(beats) or len(beats) == 1 else [])
        if not guilty and self._warned != newest:
            self._warned = newest
            _say(f"no rank here has got on for {quiet:.0f} s, and all wait for others; stacks in {self.folder}")
            return
        self._end(beats, guilty, quiet, stacks)

    def _stacks(self, beats: dict[int, heartbeat.Beat]) -> dict[int, str]:
        """What each rank adds to its file of stacks when asked; nothing, for one that does not answer."""
        files = {rank: heartbeat.stacks_of(self.folder, rank) for rank in beats}
        before = {rank: path.stat().st_size for rank, path in files.items()}
        for beat in beats.values():
            with suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGUSR1)
        deadline, found = time.monotonic() + ANSWER_SECONDS, dict.fromkeys(files, "")
        while time.monotonic() < deadline and not all(found.values()):
            time.sleep(0.1)
            sizes = {rank: path.stat().st_size for rank, path in files.items()}
            answered = [rank for rank in files if sizes[rank] > before[rank]]
            time.sleep(0.1 if answered else 0)  # the rest of what is being written
            found |= {rank: files[rank].read_text(errors="replace")[before[rank] :] for rank in answered}
        return found

    def _end(self, beats: dict[int, heartbeat.Beat], guilty: list[int], quiet: float, stacks: dict[int, str]) -> None:
        _say(f"no rank here has got on for {quiet:.0f} s; the stacks of all are in {self.folder}/rank*.stack.txt")
        for rank in guilty or beats:
            beat = beats[rank]
            message = f"hangs: nothing for {quiet:.0f} s since {beat.doing} of step {beat.step}"
            message += f" (ranks.hang_timeout={beat.limit:g})"
            if not stacks[rank]:
                message += "; the process is stopped and answers no signal"
            elif not guilty:
                message += "; all ranks of this host wait for others: see the other hosts, and the network between them"
            report = str(heartbeat.stacks_of(self.folder, rank))
            _say(f"rank {rank} {message}")
            failure.write_hang(rank, message, where(stacks[rank]), report, self.folder)
        for rank in guilty or beats:
            with suppress(ProcessLookupError):
                os.kill(beats[rank].pid, signal.SIGKILL)
        self.ranks = ()  # until the next start


@contextmanager
def watching(watch: Watch, seconds: float = 0.5) -> Iterator[None]:
    """Looks every so many seconds while the body runs."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            with suppress(OSError):  # a restart is just clearing the folder
                watch.look()

    thread = threading.Thread(target=work, daemon=True, name="watch")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def waits(stacks: str) -> bool:
    """Whether the main thread of faulthandler's dump is inside a collective."""
    return any(WAITING.search(line) for line in _main(stacks)[:3])


def where(stacks: str) -> str:
    """file:line of the innermost frame of the main thread that is not inside an installed package."""
    frames = [match for line in _main(stacks) if (match := FRAME.search(line))]
    own = [frame for frame in frames if "site-packages" not in frame["file"]]
    return "{file}:{line} in {function}".format(**(own or frames)[0].groupdict()) if frames else ""


def _main(stacks: str) -> list[str]:
    """Frames of the main thread, the innermost first: faulthandler writes it last."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)
    return [line for line in threads[-1].splitlines() if FRAME.search(line)]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
