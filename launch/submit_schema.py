"""The shape of `moeweave-submit`'s own config: what runs, on how many hosts, with what there, and by which launcher."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeweave.launch.launchers.kubernetes import Kubernetes
from moeweave.launch.launchers.local import Local
from moeweave.launch.launchers.skypilot import Skypilot
from moeweave.launch.launchers.slurm import Slurm
from moeweave.launch.launchers.ssh import Ssh
from moeweave.launch.schema import ConfigError, RunConfig, at_least, one_of, require
from moeweave.launch.strict import build

LAUNCHERS: dict[str, type] = {
    "local": Local,
    "ssh": Ssh,
    "slurm": Slurm,
    "kubernetes": Kubernetes,
    "skypilot": Skypilot,
}
AnyLauncher = Local | Ssh | Slurm | Kubernetes | Skypilot


@dataclass(frozen=True)
class SubmitConfig:
    """Everything that `moeweave-submit` reads for itself; `launcher` is one of LAUNCHERS in the end."""

    program: str = "train"
    nodes: int | None = None
    ranks_per_node: int | None = None
    min_nodes: int | None = None
    max_restarts: int | None = None
    cpu: bool | None = None
    show: bool = False
    check: bool = False
    code: str = "shared"
    code_dir: str | None = None
    python: str | None = None
    container: str | None = None
    setup: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    interface: str | None = None
    port: int | None = None
    run: RunConfig = field(default_factory=RunConfig)
    launcher: Any = None

    def __post_init__(self) -> None:
        one_of("code", self.code, ("shared", "rsync"))
        for name in ("nodes", "ranks_per_node", "min_nodes"):
            at_least(1, **{name: getattr(self, name) or 1})
        at_least(0, max_restarts=self.max_restarts or 0)
        rule = "must be a port above those of the system, 1024 to 65535"
        require(self.port is None or 1024 <= self.port <= 65535, "port", self.port, rule, "Set port=29400 or another.")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"env.{name}: is no name of an environment variable. Use letters, digits and _.")
        for name in ("python", "container", "interface"):
            value = getattr(self, name)
            if value is not None and (not value or value.startswith("-") or not value.isprintable()):
                raise ConfigError(f"{name}={value!r}: must not be empty or begin with a dash. Correct it.")


def load(values: Mapping[str, Any]) -> tuple[SubmitConfig, AnyLauncher]:
    """The config and its launcher, from composed values. Raises ConfigError."""
    launcher = values.get("launcher")
    kind = launcher.get("kind") if isinstance(launcher, Mapping) else None
    if kind not in LAUNCHERS:
        one_of("launcher.kind", str(kind), LAUNCHERS)
    assert kind is not None
    options = LAUNCHERS[kind]
    # A schema whose launcher is this kind, so that its fields are checked like all others.
    typed = dataclasses.make_dataclass(
        "SubmitConfig", [("launcher", options, field(default_factory=options))], bases=(SubmitConfig,), frozen=True
    )
    config: Any = build(typed, values)
    return config, config.launcher
