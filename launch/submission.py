"""What is kept of a submission, so that another terminal can ask for its state, read its logs, and stop it.

<run folder>/submit/<n>/
  config.yaml    the program's config, resolved: what the ranks read
  job.<kind>     what was submitted, as `show=true` prints it
  state.json     the launcher, the job's id there, and the process that watches it
  result.json    the exit code, once that process has one
  <host>.log     output of each host (ssh)
  ranks/         output of each rank but rank 0
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeweave.launch.schema import ConfigError


@dataclass(frozen=True)
class Submission:
    """One submission's folder."""

    path: Path

    @property
    def state(self) -> dict[str, Any]:
        return _read(self.path / "state.json")

    @property
    def result(self) -> dict[str, Any]:
        return _read(self.path / "result.json")

    def record(self, **values: Any) -> None:
        """Merges `values` into state.json; readers never see half of it."""
        _write(self.path / "state.json", self.state | values)

    def watched_by_me(self) -> None:
        """Notes that this process ends when the job does."""
        self.record(pid=os.getpid(), born=_born(os.getpid()), host=socket.gethostname())

    def finish(self, code: int) -> None:
        _write(self.path / "result.json", {"code": code, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def watcher(self) -> int | None:
        """The process that watches the job, if it lives on this machine."""
        state = self.state
        pid = state.get("pid")
        if pid is None or state.get("host") != socket.gethostname() or _born(pid) != state.get("born"):
            return None
        return int(pid)

    # ---- for launchers that watch their job themselves

    def status(self) -> str:
        """One line: running, done, failed, or lost."""
        if self.result:
            code = self.result["code"]
            return f"{'done' if code == 0 else f'failed, exit code {code}'} at {self.result['time']}"
        if (pid := self.watcher()) is not None:
            return f"running, watched by process {pid} since {self.state['time']}"
        if self.state.get("host") not in (None, socket.gethostname()):
            return f"unknown here: it was submitted on {self.state['host']}. Ask there."
        return "lost: the process that watched it was killed, and the job with it"

    def logs(self) -> str:
        """Every log of the folder, each under its name."""
        paths = sorted([*self.path.glob("*.log"), *self.path.glob("ranks/*.log")])
        found = [(path, path.read_text(errors="replace")) for path in paths]
        shown = [f"==> {path.relative_to(self.path)} <==\n{text}" for path, text in found if text]
        return "\n".join(shown) or "no output yet"

    def stop(self, seconds: float = 60) -> str:
        """Interrupts the watching process as ctrl-C would, and waits for its end."""
        pid = self.watcher()
        if self.result or pid is None:
            return self.status()
        os.kill(pid, signal.SIGINT)
        deadline = time.monotonic() + seconds
        while self.watcher() is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        return (
            "stopped" if self.watcher() is None else f"still running after {seconds:.0f} s: end process {pid} yourself"
        )


def new(run_dir: Path) -> Submission:
    """The folder for the next submission of a run; nobody else may read it, for it holds the job's token."""
    root = run_dir / "submit"
    number = len(list(root.iterdir())) if root.is_dir() else 0
    while (root / str(number)).exists():
        number += 1
    return Submission(root / str(number))


def create(submission: Submission, **state: Any) -> None:
    """Makes the folder with its first state."""
    submission.path.parent.mkdir(parents=True, exist_ok=True)
    submission.path.mkdir(mode=0o700)
    submission.record(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **state)


def newest(run_dir: Path) -> Submission:
    """The latest submission of a run. Raises ConfigError where there is none."""
    root = run_dir / "submit"
    numbers = [int(path.name) for path in root.iterdir() if path.name.isdigit()] if root.is_dir() else []
    if not numbers:
        raise ConfigError(f"{run_dir}: holds no submission. Name the folder of a run that moeweave-submit made.")
    return Submission(root / str(max(numbers)))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1))
    partial.replace(path)


def _born(pid: int) -> str | None:
    """When the process began, in the kernel's clock (Linux); a later process of that id has another number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rsplit(")", 1)[1].split()
    return None if state == "Z" else rest[18]
