"""Code that goes along with a job, by rsync: without what is no code, and without the run folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from moeweave.launch.job import Job
from moeweave.launch.schema import ConfigError

NOT_CODE = (".git", ".venv", ".venv-*", "__pycache__", "runs", "*.pyc")


def not_code(job: Job, folder: str, relative: bool = False) -> list[str]:
    """rsync's options that leave out what is no code in `folder`. `relative`: it is copied with rsync's --relative."""
    names = list(NOT_CODE)
    if Path(job.run_dir).is_relative_to(folder) and job.run_dir != folder:
        own = job.run_dir if relative else f"/{Path(job.run_dir).relative_to(folder)}"
        names.append(re.sub(r"([*?\[])", r"\\\1", own))
    return [f"--exclude={name}" for name in names]


def run_copy(words: list[str]) -> None:
    """Runs rsync. Raises ConfigError with its first words, and those of the system where there is none."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"code=rsync: {error}. Install rsync, or set code=shared.") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ConfigError(f"{words[-1]}: could not be copied to: {lines[0] if lines else 'rsync said nothing'}.")
