"""Runs one command a host at the same time: their output gathered line by line, and all ended when one is.

Each command reads a script from its standard input, which stays open for as long as the host shall run: when it closes,
because the user interrupts, a host fails, or this process dies, the agents at the other end stop.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

CONNECTED = "moeweave: connected"


@dataclass(frozen=True)
class Command:
    """What one host is sent: a command line of this machine, and the script that the far shell reads."""

    host: str
    words: tuple[str, ...]
    script: str


@dataclass
class Running:
    """One host's command under way."""

    command: Command
    process: subprocess.Popen[str]
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

    host: str
    code: int
    connected: bool
    lines: tuple[str, ...]


@contextmanager
def all_of(commands: Sequence[Command], log_dir: Path | None = None, echo: bool = True) -> Iterator[list[Running]]:
    """Starts every command; on leaving, however that happens, all are told to stop and none is left running."""
    running: list[Running] = []
    width = max(len(command.host) for command in commands)
    printing = threading.Lock()
    try:
        # One by one into a list that is already ours to end.
        running.extend(_start(command, log_dir, width if echo else None, printing) for command in commands)
        yield running
    finally:
        _end(running)


def wait(running: Sequence[Running], connect_seconds: float, num_needed: int) -> Iterator[Ended]:
    """Each host's end as it comes, and hosts that have not answered in time. Stops once fewer than `num_needed` could
    still finish."""
    started, left, lost = time.monotonic(), list(running), 0
    while left:
        late = time.monotonic() - started > connect_seconds
        for one in list(left):
            code = one.process.poll()
            if code is None and not (late and not one.connected.is_set()):
                continue
            left.remove(one)
            if code is not None and one.reader is not None:
                one.reader.join(5)
            ended = Ended(
                one.command.host, -1 if code is None else code, one.connected.is_set(), tuple(one.lines[-20:])
            )
            lost += ended.code != 0
            yield ended
        if lost and len(running) - lost < num_needed:
            return
        time.sleep(0.05)


def _start(command: Command, log_dir: Path | None, width: int | None, printing: threading.Lock) -> Running:
    # A session of its own: ctrl-C reaches this process alone, which then ends all hosts in order.
    process = subprocess.Popen(
        command.words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    one = Running(command, process)
    log = None if log_dir is None else log_dir / f"{command.host.replace('/', '_')}.log"
    one.reader = threading.Thread(target=_read, args=(one, log, width, printing), daemon=True)
    one.reader.start()
    with suppress(OSError):  # it has ended already, and says why
        assert process.stdin is not None
        process.stdin.write(f"echo {CONNECTED!r}\n{command.script}")
        process.stdin.flush()
    return one


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
            one.process.kill()
            one.process.wait()
    for one in running:
        if one.reader is not None:
            one.reader.join(5)
