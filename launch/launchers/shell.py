"""The script that one host runs, as text: environment, folder, agent. Every value in it is quoted."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from moeweave.launch.job import Job, Layout, quoted
from moeweave.launch.schema import ConfigError


def host_script(job: Job, words: list[str], more: Mapping[str, str] | None = None) -> str:
    """Runs `words` (an agent's, or another program's) on one host, with the job's environment and `more`."""
    variables = job.variables() | dict(more or {})
    lines = list(exports(variables))
    if job.directory is not None:
        lines.append(f"cd -- {shlex.quote(job.directory)} || exit 2")
    if job.setup is not None:
        lines.append(f"source {shlex.quote(job.setup)} </dev/null || exit 2")
    if job.container is not None:
        words = docker(job, words, variables)
    return "\n".join([*lines, f"exec {quoted(words)}", ""])


def exports(variables: Mapping[str, str]) -> Iterable[str]:
    """A line of shell for each variable; their names were checked by the schema."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def docker(job: Job, words: list[str], names: Iterable[str]) -> list[str]:
    """`words` inside the job's image, which sees the code and the run folder, and listens on the host's own network."""
    assert job.container is not None
    run = ["docker", "run", "--rm", "--interactive", "--init", "--network", "host", "--ipc", "host"]
    run += [] if job.cpu else ["--gpus", "all"]
    for path in mounted(job):
        run += ["--mount", f"type=bind,source={path},target={path}"]
    for name in names:
        run += ["--env", name]
    return [*run, "--workdir", job.directory or "/", job.container, *words]


def same_paths(folder: Path, run_dir: Path, code_dir: str | None, container: str | None) -> Layout:
    """The layout of hosts that have the files of this machine at the same paths."""
    python = sys.executable if container is None else "python"
    return Layout(str(run_dir), str(folder), f"{folder}/config.yaml", str(Path.cwd()), code_dir, python)


def mounted(job: Job) -> list[str]:
    """The folders that a container sees, at the same paths. Raises ConfigError for one that its options cannot say."""
    folders = {"the working folder": job.directory, "run.dir": job.run_dir, "code_dir": job.code_dir}
    found = {name: path for name, path in folders.items() if path is not None}
    for name, path in found.items():
        if not re.fullmatch(r"[^,:\"\n]+", path):
            raise ConfigError(f"{name} {path!r}: may not hold a comma, a colon or a quote with container=. Rename it.")
    return list(dict.fromkeys(found.values()))
