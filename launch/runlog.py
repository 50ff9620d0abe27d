"""A run's folder: what was run, on what, and what came of it.

<root>/<date-time>-<name>/
  config.yaml        every field, resolved; `moeweave-train` with the same values repeats the run. A resume that is
                     refused leaves it as it is
  started.jsonl      one line per start or resume: time, command, git state, versions, machine, checkpoint
  metrics.jsonl      one line per optimizer step, in order, none lost or repeated by a resume
  curves.png         loss, and load per expert
  checkpoints/       complete checkpoints, the newest few
  logs/rank<r>.log   what the library said on each rank: its choices and warnings
  logs/<n>/          output and failures of each rank, for the n-th start
  proof.json         the comparison with the unwrapped model
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from moeweave.launch.schema import ConfigError

PACKAGES = (
    "moeweave", "torch", "triton", "torch-npu", "transformers", "numpy", "hydra-core", "omegaconf", "safetensors",
    "deepspeed", "torchtitan",
)  # fmt: skip
SECONDS_TO_END = 3.0  # that ranks may live on after whoever started them was killed


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def picture(self) -> Path:
        return self.path / "curves.png"

    @property
    def proof(self) -> Path:
        return self.path / "proof.json"

    def logs(self) -> Path:
        """The folder for the next start's logs; not yet made."""
        logs = self.path / "logs"
        starts = [path for path in logs.iterdir() if path.is_dir()] if logs.is_dir() else []
        return logs / str(len(starts))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def starts(self) -> Path:
        return self.path / "started.jsonl"

    def holds_a_run(self) -> bool:
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    def check_own(self) -> None:
        """Raises ConfigError where the folder holds a config.yaml that is not of a run, and would be replaced."""
        if self.config.exists() and not self.starts.exists():
            raise ConfigError(
                f"run.dir={self.path}: holds a config.yaml, and no run has left it there (there is no started.jsonl). "
                "Name another folder, or one that does not exist yet."
            )


def choose(root: str, directory: str | None, name: str) -> RunFolder:
    """The folder named by the config, or a new one that no other run has. Nothing is created."""
    if directory is not None:
        if not directory:
            raise ConfigError("run.dir=: is empty. Name a folder, or leave run.dir out for a new one.")
        path = Path(directory).expanduser().absolute()
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            what = "is a file" if there == path else f"{there} is a file"
            raise ConfigError(f"run.dir={directory}: {what}. Name a folder, or one that does not exist yet.")
        return RunFolder(path)
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d-%H%M%S")
    path = Path(root).expanduser().absolute() / f"{stamp}-{name}"
    number = 2
    while path.exists():
        path = path.with_name(f"{stamp}-{name}-{number}")
        number += 1
    return RunFolder(path)


def hold(folder: RunFolder, *, alone: bool = True) -> IO[str]:
    """started.jsonl, open: as long as it is, another run refuses the folder.

    Raises ConfigError where another run holds it, unless `alone` is False: ranks that are started again may do so while
    the ones before them, cut off on another host, still live.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    file = folder.starts.open("a")
    if not _lock(file) and alone:
        file.close()
        raise _taken(folder)
    return file


def record_start(starts: IO[str], folder: RunFolder, command: list[str], checkpoint: str | None = None) -> None:
    """Writes this start's line; `checkpoint` is what it goes on from."""
    path = None if checkpoint is None else Path(checkpoint).resolve()
    mine = path is not None and path.is_relative_to(folder.path.resolve())
    shown = None if path is None else str(path.relative_to(folder.path.resolve()) if mine else path)
    starts.write(json.dumps(_start(command) | {"checkpoint": shown}) + "\n")
    starts.flush()


def origin(folder: RunFolder) -> Path | None:
    """The checkpoint of another run that this one began from; None for a run that began at step 1."""
    starts = _starts(folder)
    paths = [Path(start["checkpoint"]) if start.get("checkpoint") else None for start in starts]
    begun = [path for path in paths if path is None or path.is_absolute()]  # the others went on from an own checkpoint
    return begun[-1] if begun else None


def first_step(folder: RunFolder) -> int:
    """The first step that this run has taken itself."""
    lines = read_metrics(folder) if origin(folder) is not None else []
    return int(lines[0]["step"]) if lines else 1


def check_free(folder: RunFolder) -> None:
    """Raises ConfigError where another run, on this machine or on one that shares the folder, is writing into it."""
    if folder.starts.exists():
        with folder.starts.open("a") as file:
            if not _lock(file):
                raise _taken(folder)


def _lock(file: IO[str]) -> bool:
    """Locks the file until it is closed, or its process ends. False where another process holds it."""
    deadline = time.monotonic() + SECONDS_TO_END
    while not (locked := _lock_now(file)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return locked


def _lock_now(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _taken(folder: RunFolder) -> ConfigError:
    starts = _starts(folder)  # none yet, where it has just begun
    since = f", started at {starts[-1]['time']} on {starts[-1]['machine']['host']}" if starts else ""
    return ConfigError(
        f"run.dir={folder.path}: another run is writing into it{since}. Wait for its end or stop it, or name another "
        "folder."
    )


def _starts(folder: RunFolder) -> list[dict[str, Any]]:
    """The whole lines of started.jsonl."""
    if not folder.starts.exists():
        return []
    return [json.loads(line) for line in folder.starts.read_text().split("\n")[:-1] if line]


def record_config(folder: RunFolder, config_yaml: str) -> list[str]:
    """Writes config.yaml. Returns the lines that differ from those of the last start."""
    before = folder.config.read_text().splitlines() if folder.config.exists() else None
    partial = folder.config.with_suffix(".partial")
    partial.write_text(config_yaml)
    partial.replace(folder.config)
    return [] if before is None else [line.strip() for line in config_yaml.splitlines() if line not in before]


class Metrics:
    """metrics.jsonl: appends one line per step; a reader, and a resumed run, never see half of one."""

    def __init__(self, folder: RunFolder, first_step: int, *, since: int = 1):
        """Keeps the lines of steps `since` to `first_step` - 1 and drops the rest, which will be run again.

        `since` is 1 (steps are counted from there) but for a run that began from another run's checkpoint.
        """
        kept = [line for line in read_metrics(folder) if since <= line["step"] < first_step]
        if [line["step"] for line in kept] != list(range(since, first_step)):
            raise ValueError(
                f"{folder.metrics}: a checkpoint of step {first_step - 1} is beside it, but it does not hold steps "
                f"{since} to {first_step - 1} once each. Restore it, or begin another run with run.dir=<new folder>."
            )
        partial = folder.metrics.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(folder.metrics)
        self.lines = kept
        self._file = folder.metrics.open("a")

    def add(self, line: dict[str, Any]) -> None:
        """Appends one line; it is with the operating system when this returns, so a killed process loses none."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.lines.append(line)

    def sync(self) -> None:
        """Puts the lines on disk: before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a last line cut short by a crash is left out.

    Raises ValueError for a line that no run has written.
    """
    if not folder.metrics.exists():
        return []
    lines = folder.metrics.read_text(errors="replace").split("\n")
    return [_metric(line, number, folder) for number, line in enumerate(lines[:-1], start=1) if line]


def _metric(line: str, number: int, folder: RunFolder) -> dict[str, Any]:
    with suppress(json.JSONDecodeError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
    raise ValueError(
        f"{folder.metrics}: line {number} is no step of a run. Restore the file, or begin another run with "
        "run.dir=<new folder>."
    )


def _start(command: list[str]) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(command),
        "directory": str(Path.cwd()),
        "git": git_state(Path.cwd()),
        "versions": versions(),
        "machine": {"host": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, those that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def provenance() -> dict[str, Any]:
    """What a figure measured on CPU ranks is kept with: {device: {cpu, cores}, versions, git}."""
    git = git_state(Path(__file__).resolve().parent)
    return {"device": {"cpu": processor(), "cores": os.cpu_count()}, "versions": versions(), "git": git}


def processor() -> str:
    """The CPU's name, as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def git_state(directory: Path) -> dict[str, Any] | None:
    """{sha, branch, dirty} of the repository that holds `directory`; None without git or outside a repository."""
    sha, status = _git(directory, "rev-parse", "HEAD"), _git(directory, "status", "--porcelain")
    if sha is None or status is None:
        return None
    return {"sha": sha, "branch": _git(directory, "rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(status)}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
