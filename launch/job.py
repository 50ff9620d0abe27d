"""A job as every launcher takes it: what runs on how many hosts, all of it known and checked before anything starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from moeweave.launch.schema import ConfigError

AGENT = ("-m", "moeweave.launch.agent")


@dataclass(frozen=True)
class Layout:
    """Paths where the ranks run: the run folder, this submission's folder in it, the config, and the working folder
    (None: where the launcher starts them). `code_dir` as in `Job`; `python`: the interpreter unless the user names one.
    """

    run_dir: str
    folder: str
    config_path: str
    directory: str | None
    code_dir: str | None
    python: str


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        name: shown by queues.
        command: what each rank runs, as torchrun takes it: `-m module` or a script's path, and its arguments.
        folder: of this submission, with the config and the logs; the same path on every host.
        run_dir: of the run, which holds `folder`.
        directory: where the ranks run, or None for where the launcher starts them.
        nodes, min_nodes: hosts, and how few of them the job goes on with.
        ranks_per_node: ranks of each host.
        max_restarts: how often all ranks are started again after one has failed.
        token: names the rendezvous; nobody can guess it.
        port: of the rendezvous on the first host.
        cpu: whether no accelerator is asked for.
        python: the interpreter on the hosts.
        config: the program's resolved config as YAML, or "" for a script of the user's.
        config_path: where the ranks find that config.
        config_source: where this machine has it.
        env: variables for the ranks.
        interface: the network interface that the hosts share, or None for the one with the way to the first host.
        container: image that the agents run in, or None.
        setup: a shell script on the hosts that is sourced first, or None.
        code: "shared" (every host has it at the same path) or "rsync" (copied from here).
        code_dir: the folder of the code, added to PYTHONPATH; None where the interpreter has it installed.
    """

    name: str
    command: tuple[str, ...]
    folder: str
    run_dir: str
    directory: str | None
    nodes: int
    ranks_per_node: int
    token: str
    port: int
    python: str
    min_nodes: int = 0
    max_restarts: int = 0
    cpu: bool = False
    config: str = ""
    config_path: str = ""
    config_source: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    container: str | None = None
    setup: str | None = None
    code: str = "shared"
    code_dir: str | None = None

    @property
    def logs(self) -> str:
        """Where each rank's output goes, but for rank 0's."""
        return f"{self.folder}/ranks"

    def variables(self) -> dict[str, str]:
        """The environment of every agent. What the user asks for in `env` wins."""
        found = {"PET_RDZV_ID": self.token, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        if self.code_dir is not None:
            found["PYTHONPATH"] = self.code_dir
        if self.command[0] == "-m":
            found["PYTHONSAFEPATH"] = "1"  # a folder named comm or launch where the ranks run would hide a package
        if self.interface is not None:
            found |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return found | dict(self.env)

    def agent(self, endpoint: str | None, node_rank: int | None = None) -> list[str]:
        """The agent's command line. Without an endpoint or a rank, the agent reads torchrun's variables for them."""
        nodes = str(self.nodes) if self.min_nodes in (0, self.nodes) else f"{self.min_nodes}:{self.nodes}"
        words = [self.python, *AGENT, "--nnodes", nodes, "--nproc-per-node", str(self.ranks_per_node)]
        words += [] if node_rank is None else ["--node-rank", str(node_rank)]
        words += [] if endpoint is None else ["--rdzv-endpoint", endpoint]
        return [*words, "--max-restarts", str(self.max_restarts), "--log-dir", self.logs, *self.command]


def quoted(words: list[str]) -> str:
    """The words as one line of a POSIX shell."""
    return shlex.join(words)


def safe(name: str, value: str, pattern: str = r"[A-Za-z0-9][A-Za-z0-9._:@/+=,-]*") -> str:
    """`value`, where it goes to a place that has no quotes. Raises ConfigError when it has other characters."""
    if not re.fullmatch(pattern, value):
        raise ConfigError(
            f"{name}={value!r}: may only hold letters, digits and ._:@/+=,- and begin with a letter or a digit. "
            "Rename it."
        )
    return value


def label(name: str) -> str:
    """`name` as queues and Kubernetes take it: small letters, digits and dashes, at most 50 characters."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-") or "job"
