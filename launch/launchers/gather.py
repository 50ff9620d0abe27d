"""Runs one command a host at the same time: their output gathered line by line, and all ended when one is.

Each command reads a script from its standard input, which stays open for as long as the host shall run: when it closes,
because the user interrupts, a host fails, or this process dies, the agents at the other end stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

CONNECTED = "moeweave: connected"
LOST = 255  # ssh's exit code when the connection breaks, or a signal ends what runs at the other end


@dataclass(frozen=True)
class Command:
    """What one host is sent: a command line of this machine, and the script that the far shell reads."""

    host: str
    words: tuple[str, ...]
    script: str


@dataclass
class Running:
    """One host's command under way; `since` is when it could first connect, on the monotonic clock."""

    command: Command
    process: subprocess.Popen[str]
    since: float
    connected: threading.Event = field(default_factory=threading.Event)
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None

    def hang_up(self) -> None:
        """Closes the script's standard input, which the agent takes as the order to stop."""
        with suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()


@dataclass(frozen=True)
class Ended:
    """How a host's command ended: `code` is the command's own, `connected` whether the far shell ever spoke."""

    command: Command
    code: int
    connected: bool
    lines: tuple[str, ...]

    @property
    def host(self) -> str:
        return self.command.host

    @property
    def was_lost(self) -> bool:
        """Whether nothing at the other end said how it ended: it was killed, or the way there is broken."""
        return not self.connected or self.code == LOST or self.code > 128 or self.code < 0


class Gathering:
    """Commands of several hosts under way: their output in one place, and their ends one after the other."""

    def __init__(self, log_dir: Path | None, width: int | None):
        self.running: list[Running] = []
        self._log_dir, self._width, self._printing = log_dir, width, threading.Lock()

    def start(self, command: Command, delay: float = 0) -> None:
        """Starts the command after `delay` seconds."""
        words = command.words
        if delay:
            words = ("bash", "-c", 'sleep "$1"; shift; exec "$@"', "later", str(delay), *words)
        # A session of its own: ctrl-C reaches this process alone, which then ends all hosts in order.
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        one = Running(command, process, time.monotonic() + delay)
        self.running.append(one)
        log = None if self._log_dir is None else self._log_dir / f"{command.host.replace('/', '_')}.log"
        one.reader = threading.Thread(target=_read, args=(one, log, self._width, self._printing), daemon=True)
        one.reader.start()
        with suppress(OSError):  # it has ended already, and says why
            assert process.stdin is not None
            process.stdin.write(f"echo {CONNECTED!r}\n{command.script}")
            process.stdin.flush()

    def ends(self, connect_seconds: float) -> Iterator[Ended]:
        """Each command's end as it comes, those that have not connected in time too, until none is left.

        The caller may start commands meanwhile.
        """
        seen: set[int] = set()
        while left := [one for one in self.running if id(one) not in seen]:
            for one in left:
                code = one.process.poll()
                late = time.monotonic() - one.since > connect_seconds and not one.connected.is_set()
                if code is None and not late:
                    continue
                seen.add(id(one))
                if code is not None and one.reader is not None:
                    one.reader.join(5)
                lines = tuple(one.lines[-20:])
                yield Ended(one.command, -1 if code is None else code, one.connected.is_set(), lines)
            time.sleep(0.05)


@contextmanager
def all_of(commands: Sequence[Command], log_dir: Path | None = None, echo: bool = True) -> Iterator[Gathering]:
    """Starts every command; on leaving, however that happens, all are told to stop and none is left running."""
    gathering = Gathering(log_dir, max(len(command.host) for command in commands) if echo else None)
    try:
        for command in commands:
            gathering.start(command)
        yield gathering
    finally:
        _end(gathering.running)


def _read(one: Running, log: Path | None, width: int | None, printing: threading.Lock) -> None:
    file = None if log is None else log.open("a")
    assert one.process.stdout is not None
    for line in one.process.stdout:
        text = line.rstrip("\n")
        if text == CONNECTED:
            one.connected.set()
            continue
        one.lines.append(text)
        if file is not None:
            file.write(line)
            file.flush()
        if width is not None:
            with printing:
                print(f"{one.command.host:<{width}} | {text}", file=sys.stdout, flush=True)
    if file is not None:
        file.close()


def _end(running: Sequence[Running], seconds: float = 45) -> None:
    """Hangs up on all, gives them time to stop their ranks, and kills what still runs here."""
    for one in running:
        one.hang_up()
    deadline = time.monotonic() + seconds
    for one in running:
        connected = one.connected.is_set()
        try:
            one.process.wait(max(0.1, deadline - time.monotonic()) if connected else 0.1)
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
    for one in running:
        if one.reader is not None:
            one.reader.join(5)
