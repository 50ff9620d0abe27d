"""What a launcher is: it says what would run, tests whether it can, starts it, and controls what it started."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from moeweave.launch.job import Job, Layout
from moeweave.launch.submission import Submission


class Launcher(Protocol):
    """Sends jobs to one kind of place. The options of that place are its fields."""

    def layout(self, folder: Path, run_dir: Path, code_dir: str | None, container: str | None) -> Layout:
        """Where things are for the ranks, from where they are here."""
        ...

    def render(self, job: Job) -> str:
        """What would run, whole, as text: a script or YAML. A pure function of its arguments and the options."""
        ...

    def check(self, job: Job) -> list[str]:
        """What would keep the job from running there, a line each, found by asking the hosts or the queue."""
        ...

    def submit(self, job: Job, submission: Submission) -> int:
        """Starts the job. Returns the exit code of a job that it waits for, or 0 once a queue has taken it."""
        ...


class Control(Protocol):
    """What can be asked of a job that was submitted, from any terminal."""

    def status(self, submission: Submission) -> str:
        """One line."""
        ...

    def logs(self, submission: Submission) -> str:
        """All output that can be reached."""
        ...

    def stop(self, submission: Submission) -> str:
        """Ends the job; one line on how that went."""
        ...
