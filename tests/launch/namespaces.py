"""Two "hosts" on one machine: network namespaces joined by a link, with an sshd in each.

Everything belongs to the two namespaces, which nothing outside reaches; leaving the context removes them, their
processes and their files, however it is left.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class TwoHosts:
    """The namespaces' names, their addresses, and what ssh needs to log in to both."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    folder: Path

    def ssh_overrides(self) -> list[str]:
        """Arguments of moeweave-submit."""
        known, key = self.folder / "known_hosts", self.folder / "key"
        return [
            "launcher=ssh",
            f"launcher.hosts=[{','.join(self.addresses)}]",
            "launcher.port=2222",
            f"launcher.identity={key}",
            f"launcher.options=['UserKnownHostsFile={known}','GlobalKnownHostsFile=/dev/null','IdentitiesOnly=yes']",
        ]

    def processes(self) -> dict[int, str]:
        """Command lines of all processes in the namespaces but the two sshd that the context started."""
        found: dict[int, str] = {}
        for name in self.names:
            for pid in _pids(name):
                with suppress(OSError):
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return {pid: line for pid, line in found.items() if line and "sshd" not in line}

    def listeners(self) -> set[tuple[str, int]]:
        """(address, port) of every TCP socket that listens in the namespaces."""
        found = set()
        for name in self.names:
            text = _run("ip", "netns", "exec", name, "ss", "-H", "-l", "-t", "-n")
            for line in text.splitlines():
                address, _, port = line.split()[3].rpartition(":")
                found.add((address, int(port)))
        return found


def why_not(programs: Sequence[str] = ("ip", "ss", "ssh", "sshd", "ssh-keygen")) -> str | None:
    """Why namespaces, and what needs these programs, cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in programs:
        if shutil.which(program) is None and not Path(f"/usr/sbin/{program}").exists():
            return f"this machine has no {program}"
    name = f"mw{os.getpid()}t"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"this machine makes no network namespaces: {done.stderr.strip()}"
    link = ["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
    done = subprocess.run(link, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=False)
    return f"this kernel has no veth links: {done.stderr.strip()}" if done.returncode else None


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """The hosts, or a skip that says what is missing."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    servers: list[subprocess.Popen] = []
    try:
        with two_networks() as names:
            hosts = TwoHosts(names, ADDRESSES, folder)
            _keys(hosts)
            servers += [_sshd(name, address, folder) for name, address in zip(names, ADDRESSES, strict=True)]
            for server, address in zip(servers, ADDRESSES, strict=True):
                _until_it_listens(hosts, server, address)
            yield hosts
    finally:
        for server in servers:
            server.wait(10)


@contextmanager
def two_networks() -> Iterator[tuple[str, str]]:
    """Names of two namespaces joined by a link; what still runs in them afterwards is killed."""
    names = (f"mw{os.getpid()}a", f"mw{os.getpid()}b")
    try:
        _link(names)
        yield names
    finally:
        for name in names:
            for pid in _pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def shape(names: Sequence[str], rate: str) -> None:
    """Limits what each of the namespaces sends over the link, as in `tc`: "200mbit"."""
    for name in names:
        # A burst of several segments as the kernel hands them on, and a queue of 50 ms, as switches have.
        limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        _run("tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", *limit)


def over_nodes(names: Sequence[str], ranks_per_node: int, program: Sequence[str], timeout: float) -> list[str]:
    """What a program printed on each node, run by as many ranks in each namespace, under a torchrun agent each.

    program: what follows torchrun's own arguments. Raises RuntimeError with all nodes' output where one failed.
    """
    nodes = [_agent(name, node, ranks_per_node, program) for node, name in enumerate(names)]
    try:
        texts = [node.communicate(timeout=timeout)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    if any(node.returncode for node in nodes):
        raise RuntimeError("\n".join(texts))
    return texts


def _agent(name: str, node: int, ranks_per_node: int, program: Sequence[str]) -> subprocess.Popen[str]:
    agent = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", f"--nproc-per-node={ranks_per_node}"]
    agent += [f"--master-addr={ADDRESSES[0]}", "--master-port=29500", f"--local-addr={ADDRESSES[node]}"]
    command = ["ip", "netns", "exec", name, sys.executable, *agent, *program]
    variables = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def enter(name: str) -> None:
    """Moves this process into a namespace's network."""
    with Path(f"/var/run/netns/{name}").open() as file:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.setns(file.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


def _link(names: tuple[str, str]) -> None:
    one, other = names
    for name in names:
        _run("ip", "netns", "add", name)
    _run("ip", "link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other)
    for name, address in zip(names, ADDRESSES, strict=True):
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")


def _keys(hosts: TwoHosts) -> None:
    for name in ("key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(hosts.folder / name))
    public = (hosts.folder / "host_key.pub").read_text().split()[:2]
    lines = [f"[{address}]:2222 {' '.join(public)}\n" for address in hosts.addresses]
    (hosts.folder / "known_hosts").write_text("".join(lines))
    shutil.copy(hosts.folder / "key.pub", hosts.folder / "authorized_keys")


def _sshd(name: str, address: str, folder: Path) -> subprocess.Popen:
    settings = {
        "ListenAddress": f"{address}:2222",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "AllowUsers": pwd.getpwuid(os.geteuid()).pw_name,
    }
    config = folder / f"sshd-{name}"
    config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it for its unprivileged half
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    log = (folder / f"sshd-{name}.log").open("w")
    return subprocess.Popen(["ip", "netns", "exec", name, program, "-D", "-e", "-f", str(config)], stderr=log)


def _until_it_listens(hosts: TwoHosts, server: subprocess.Popen, address: str) -> None:
    deadline = time.monotonic() + 20
    while (address, 2222) not in hosts.listeners():
        logs = "".join(path.read_text() for path in hosts.folder.glob("sshd-*.log"))
        assert server.poll() is None and time.monotonic() < deadline, f"sshd does not listen:\n{logs}"
        time.sleep(0.1)


def _pids(name: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
