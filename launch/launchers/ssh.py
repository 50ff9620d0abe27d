"""Hosts by ssh: one agent each, their output gathered, and all of them ended together.

ssh's own safety stays as the user has it: host keys are checked, and nothing asks for a password. The far shell gets
the script on its standard input, so that nothing of it stands on a command line or is read by another shell first.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeweave.launch import probe
from moeweave.launch.failure import HostFailed
from moeweave.launch.job import Job, Layout, quoted
from moeweave.launch.launchers import gather
from moeweave.launch.launchers.copies import not_code, run_copy
from moeweave.launch.launchers.hostfile import Host, named, read
from moeweave.launch.launchers.shell import host_script, same_paths
from moeweave.launch.schema import ConfigError, at_least
from moeweave.launch.submission import Submission

AGAIN_SECONDS = 5  # until a lost host is asked again


@dataclass(frozen=True)
class Ssh:
    """Options of launcher=ssh."""

    kind: str = "ssh"
    hosts: list[str] = field(default_factory=list)
    hostfile: str | None = None
    port: int | None = None
    identity: str | None = None
    options: list[str] = field(default_factory=list)
    connect_timeout: int = 20

    def __post_init__(self) -> None:
        at_least(1, launcher__connect_timeout=self.connect_timeout)
        for option in self.options:
            if not option.strip() or option.startswith("-") or "\n" in option:
                raise ConfigError(f"launcher.options: {option!r} must be Name=value, as after ssh's -o.")

    def hosts_and_slots(self) -> tuple[int | None, int | None]:
        hosts = self._hosts()
        slots = {host.slots for host in hosts}
        if len(slots) > 1:
            raise ConfigError(
                f"launcher.hostfile={self.hostfile}: slots differ ({', '.join(map(str, sorted(map(str, slots))))}). "
                "Every host takes as many ranks: set ranks_per_node, and the same slots for all."
            )
        return len(hosts), slots.pop()

    def layout(self, folder: Path, run_dir: Path, code_dir: str | None, container: str | None) -> Layout:
        return same_paths(folder, run_dir, code_dir, container)

    def render(self, job: Job) -> str:
        parts = [f"# copied first: {quoted(words)}\n" for words in self._copies(job)]
        for number, command in enumerate(self._commands(job), 1):
            parts.append(f"# host {number} of {job.nodes}, the standard input of: {quoted(list(command.words))}\n")
            parts.append(command.script)
        return "\n".join(parts)

    def check(self, job: Job) -> list[str]:
        commands = [
            gather.Command(host.name, tuple(self._ssh(host.name)), host_script(job, probe.words(job, number)))
            for number, host in enumerate(self._hosts()[: job.nodes])
        ]
        found = []
        with gather.all_of(commands, echo=False) as hosts:
            for ended in hosts.ends(self.connect_timeout):
                if not ended.connected:
                    found.append(self._unreachable(ended))
                    continue
                output = "\n".join(ended.lines)
                found += [f"{ended.host} {text}" for text in probe.problems(probe.read(output), output)]
        return found

    def submit(self, job: Job, submission: Submission) -> int:
        submission.watched_by_me()
        code = 1
        try:
            for words in self._copies(job):
                run_copy(words)
            code = self._watch(job, submission)
        finally:
            submission.finish(code)
        return code

    def status(self, submission: Submission) -> str:
        return submission.status()

    def logs(self, submission: Submission) -> str:
        return submission.logs()

    def stop(self, submission: Submission) -> str:
        return submission.stop()

    # ----

    def _watch(self, job: Job, submission: Submission) -> int:
        """Gathers the hosts' output until they have ended; a host that is lost is started again while the others, whose
        ranks its end has stopped, wait for it.
        """
        num_needed, tries = job.min_nodes or job.nodes, job.max_restarts
        commands = self._commands(job)
        failed: list[gather.Ended] = []
        with gather.all_of(commands, submission.path) as hosts:
            for ended in hosts.ends(self.connect_timeout):
                # Without the first host, which serves the rendezvous, nobody can wait for anybody.
                if ended.code and ended.was_lost and tries and ended.host != commands[0].host and _ran(hosts, ended):
                    tries -= 1
                    print(f"starting {ended.host} again: {self._reason(ended)}", flush=True)
                    hosts.start(ended.command, AGAIN_SECONDS)
                elif ended.code:
                    failed.append(ended)
                    if job.nodes - len(failed) < num_needed:
                        break
                    print(f"going on with {job.nodes - len(failed)} hosts: {self._reason(ended)}", flush=True)
        if job.nodes - len(failed) >= num_needed:
            return 0
        if not failed[0].connected:
            raise ConfigError(self._reason(failed[0]))
        raise HostFailed(f"{self._reason(failed[0])}\n  its output: {submission.path}")

    def _reason(self, ended: gather.Ended) -> str:
        if not ended.connected:
            return self._unreachable(ended)
        said = ended.lines[-1] if ended.lines else "it said nothing"
        return f"host {ended.host} ended first, with exit code {ended.code}: {said}"

    def _unreachable(self, ended: gather.Ended) -> str:
        said = ended.lines[-1] if ended.lines else f"no answer in {self.connect_timeout} s"
        remedy = shlex.join([*self._ssh(ended.host)[:-2], "true"])
        return f"host {ended.host} cannot be reached: {said}. See that this works without a password: {remedy}"

    def _commands(self, job: Job) -> list[gather.Command]:
        hosts = self._hosts()[: job.nodes]
        if len(hosts) < job.nodes:
            raise ConfigError(f"nodes={job.nodes}: launcher=ssh has {len(hosts)} hosts. Add hosts, or lower nodes.")
        first = hosts[0].address
        endpoint = f"[{first}]:{job.port}" if ":" in first else f"{first}:{job.port}"
        return [
            gather.Command(
                host.name,
                tuple(self._ssh(host.name)),
                host_script(job, job.agent(endpoint, number), {"MOEWEAVE_LIFELINE": "1"}),
            )
            for number, host in enumerate(hosts)
        ]

    def _hosts(self) -> Sequence[Host]:
        if bool(self.hosts) == (self.hostfile is not None):
            raise ConfigError(
                f"launcher.hosts={self.hosts} launcher.hostfile={self.hostfile}: launcher=ssh needs one of them. "
                "Set launcher.hosts=[name,name], or launcher.hostfile=<a file of lines `name slots=n`>."
            )
        return named(self.hosts) if self.hosts else read(str(self.hostfile))

    def _ssh(self, host: str) -> list[str]:
        return ["ssh", *self._ssh_options(), "--", host, "bash", "-s"]

    def _ssh_options(self) -> list[str]:
        wanted = [
            "BatchMode=yes",
            f"ConnectTimeout={self.connect_timeout}",
            "ServerAliveInterval=10",
            "ServerAliveCountMax=3",
            *self.options,
        ]
        words = ["-T", *(word for option in wanted for word in ("-o", option))]
        words += [] if self.port is None else ["-p", str(self.port)]
        return words + ([] if self.identity is None else ["-i", self.identity])

    def _copies(self, job: Job) -> list[list[str]]:
        """What copies code and config to every host, where they share no file system."""
        if job.code != "rsync":
            return []
        folders = [path for path in dict.fromkeys((job.code_dir, job.directory)) if path]
        found = []
        for host in self._hosts()[: job.nodes]:
            name = host.name if ":" not in host.address else host.name.replace(host.address, f"[{host.address}]")
            start = ["rsync", "--archive", "--relative", "-e", quoted(["ssh", *self._ssh_options()])]
            found += [[*start, *not_code(job, path, relative=True), "--", f"{path}/", f"{name}:/"] for path in folders]
            found.append([*start, "--", f"{job.folder}/", f"{name}:/"])
        return found


def _ran(hosts: gather.Gathering, ended: gather.Ended) -> bool:
    """Whether the host was ever reached: one that never was is a mistake of the config's, said at once."""
    return any(one.connected.is_set() for one in hosts.running if one.command.host == ended.host)
