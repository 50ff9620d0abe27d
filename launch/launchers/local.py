"""This machine: torch elastic in this very process, as when the program is started without a launcher."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeweave.launch import probe
from moeweave.launch.job import Job, Layout
from moeweave.launch.launchers.shell import host_script, same_paths
from moeweave.launch.schema import ConfigError
from moeweave.launch.submission import Submission

ENDPOINT = "127.0.0.1:0"


@dataclass(frozen=True)
class Local:
    """Options of launcher=local: none."""

    kind: str = "local"

    def hosts_and_slots(self) -> tuple[int | None, int | None]:
        """How many hosts there are, and how many ranks each takes, where the options say so."""
        return 1, None

    def layout(self, folder: Path, run_dir: Path, code_dir: str | None, container: str | None) -> Layout:
        return same_paths(folder, run_dir, code_dir, container)

    def render(self, job: Job) -> str:
        if job.nodes > 1:
            raise ConfigError(f"nodes={job.nodes}: launcher=local is this machine alone. Use launcher=ssh for others.")
        if job.container is not None or job.setup is not None or job.code != "shared":
            raise ConfigError(
                f"container={job.container} setup={job.setup} code={job.code}: launcher=local runs in this very "
                "process. Use launcher=ssh launcher.hosts=[localhost]."
            )
        return host_script(job, self._words(job))

    def check(self, job: Job) -> list[str]:
        return probe.problems(probe.answer(probe.question(job, node_rank=0)))

    def submit(self, job: Job, submission: Submission) -> int:
        if job.python != sys.executable:
            raise ConfigError(
                f"python={job.python}: launcher=local runs in this very process. Start moeweave-submit with that "
                "interpreter, or use launcher=ssh launcher.hosts=[localhost]."
            )
        submission.watched_by_me()
        os.environ.update(job.variables())
        module, *arguments = self._words(job)[2:]
        code = int(_entry_point(module)(arguments))
        submission.finish(code)
        return code

    def status(self, submission: Submission) -> str:
        return submission.status()

    def logs(self, submission: Submission) -> str:
        return submission.logs()

    def stop(self, submission: Submission) -> str:
        return submission.stop()

    def _words(self, job: Job) -> list[str]:
        """A program of moeweave starts its ranks itself; a script of the user's gets an agent."""
        own = job.command[0] == "-m" and job.command[1].startswith("moeweave.")
        return [job.python, *job.command] if own else job.agent(ENDPOINT, node_rank=0)


def _entry_point(module: str) -> Callable[[list[str]], int]:
    """`main` of a module, or of a package's program."""
    found = importlib.import_module(module)
    return getattr(found, "main", None) or importlib.import_module(f"{module}.program").main
