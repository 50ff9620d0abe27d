"""Hosts of a job from DeepSpeed's hostfile: a line `name slots=n` for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moeweave.launch.schema import ConfigError

# No dash at the start, which ssh would take for an option, and nothing that a shell or ssh's own %h could act on.
HOST = r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9_][A-Za-z0-9._:-]*"


@dataclass(frozen=True)
class Host:
    """One host; `slots` is how many ranks it takes, or None where nobody said."""

    name: str
    slots: int | None = None

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


def read(path: str) -> list[Host]:
    """The hosts of a file. Raises ConfigError with the line that is wrong."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"launcher.hostfile={path}: no such file. Write one line `host slots=n` for each host.")
    hosts = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(rf"({HOST})(?:\s+slots\s*=\s*([1-9]\d*))?", text)
        if match is None:
            raise ConfigError(f"{path}:{number}: {text!r} must be `host slots=n`, with n of at least 1.")
        hosts.append(Host(match[1], int(match[3]) if match[3] else None))
    return _different(hosts, path)


def named(names: list[str]) -> list[Host]:
    """The hosts of a list of names. Raises ConfigError for what is no host's name."""
    for name in names:
        if not re.fullmatch(HOST, name):
            raise ConfigError(f"launcher.hosts: {name!r} is no host's name. Write host or user@host.")
    return _different([Host(name) for name in names], "launcher.hosts")


def _different(hosts: list[Host], where: str) -> list[Host]:
    twice = sorted(
        {host.name for host in hosts if hosts.count(host) > 1 or sum(h.name == host.name for h in hosts) > 1}
    )
    if twice:
        raise ConfigError(f"{where}: names {', '.join(twice)} twice. One agent runs on each host: name it once.")
    if not hosts:
        raise ConfigError(f"{where}: names no host. Add one, or use launcher=local.")
    return hosts
