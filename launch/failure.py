"""What a failing rank leaves behind, and which of several failures the user reads.

One rank raises; within milliseconds its peers lose their connections and raise too, each with a page of traceback.
Every rank writes its exception with a nanosecond clock, and only the first is shown. A rank that the launcher stops
writes where it was. So a rank that left nothing at all was killed from outside, and is what the others died of.

In one folder, for rank N: rankN.failure.json, rankN.traceback.txt (it raised), rankN.stopped.txt (stopped by the
launcher, with its stack), rankN.done (it returned); rankN.beat and rankN.stack.txt (heartbeat.py).
"""

from __future__ import annotations

import faulthandler
import json
import signal
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Failure:
    """One rank's failure: `where` is file:line in function, `when_ns` orders failures on one machine."""

    rank: int
    message: str
    where: str
    when_ns: int
    report: str = ""


class RankFailed(RuntimeError):
    """Ranks have failed; `failure` is the first of them."""

    def __init__(self, failure: Failure):
        self.failure = failure
        super().__init__(describe(failure))


class Stopped(KeyboardInterrupt):
    """The ranks were told to stop, and have; `code` is the exit code that says so."""

    def __init__(self, message: str, code: int):
        self.code = code
        super().__init__(message)


class HostFailed(RuntimeError):
    """A host of the job has failed; the message names it."""


def describe(failure: Failure) -> str:
    """What the user reads: rank, message, file:line, and where the rest is."""
    lines = [f"rank {failure.rank} failed: {failure.message}"]
    lines += [f"  at {failure.where}"] if failure.where else []
    lines += [f"  full report: {failure.report}"] if failure.report else []
    return "\n".join(lines)


def write(error: BaseException, rank: int, folder: Path) -> None:
    """Writes the exception to `folder`: a JSON record for `first`, and the traceback for people."""
    when_ns = time.time_ns()
    message = traceback.format_exception_only(type(error), error)[-1].strip()
    report = folder / f"rank{rank}.traceback.txt"
    report.write_text("".join(traceback.format_exception(error)))
    record = Failure(rank, message, _where(error), when_ns, str(report))
    _put(record, folder)


def write_hang(rank: int, message: str, where: str, report: str, folder: Path) -> None:
    """The record of a rank that cannot write its own any more; `report` holds its stacks."""
    _put(Failure(rank, message, where, time.time_ns(), report), folder)


def _put(record: Failure, folder: Path) -> None:
    partial = folder / f"rank{record.rank}.failure.partial"
    partial.write_text(json.dumps(asdict(record)))
    partial.replace(folder / f"rank{record.rank}.failure.json")


def read(rank: int, folder: Path) -> Failure | None:
    """The rank's record, or None where it left none."""
    path = folder / f"rank{rank}.failure.json"
    return Failure(**json.loads(path.read_text())) if path.exists() else None


def mark_done(rank: int, folder: Path) -> None:
    """Notes that the rank returned."""
    (folder / f"rank{rank}.done").touch()


def record_stop(rank: int, folder: Path) -> None:
    """From now on SIGTERM writes this process's stack before it ends it, even inside a collective."""
    stack = (folder / f"rank{rank}.stopped.txt").open("w")  # stays open as long as the process lives
    faulthandler.register(signal.SIGTERM, stack, all_threads=False, chain=True)


def forget(folder: Path, ranks: Iterable[int]) -> None:
    """Removes the records that those ranks left at an earlier attempt."""
    for rank in ranks:
        for kind in ("failure.json", "traceback.txt", "stopped.txt", "done", "elastic.json", "beat"):
            (folder / f"rank{rank}.{kind}").unlink(missing_ok=True)


def first(folder: Path, num_ranks: int, exit_codes: Mapping[int, int]) -> Failure:
    """The failure that caused the others, from the records in `folder` and the exit codes that are known."""
    records = {}
    # Those whose exit the launcher saw come before those that it stopped, perhaps before they could write a record.
    for rank in sorted(range(num_ranks), key=lambda rank: (rank not in exit_codes, rank)):
        if (record := read(rank, folder)) is not None:
            records[rank] = record
        elif not _was_stopped(folder, rank) and not (folder / f"rank{rank}.done").exists():
            return Failure(rank, f"the process {_how_it_died(exit_codes.get(rank))}", "", 0, _log(folder, rank))
    if not records:
        return Failure(min(exit_codes, default=0), "stopped without saying why", "", 0)
    return min(records.values(), key=lambda failure: failure.when_ns)


def _was_stopped(folder: Path, rank: int) -> bool:
    path = folder / f"rank{rank}.stopped.txt"
    return path.exists() and path.stat().st_size > 0


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is None or exit_code == -signal.SIGKILL:
        return "was killed from outside (often: the machine ran out of memory)"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code} without an exception"


def _where(error: BaseException) -> str:
    """file:line of the innermost frame that is not inside an installed package, or of the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    if not frames:
        return ""
    frame = (own or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _log(folder: Path, rank: int) -> str:
    log = folder / f"rank{rank}.stderr.log"
    return str(log) if log.exists() and log.stat().st_size else ""
