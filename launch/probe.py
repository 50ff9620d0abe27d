"""What `check=true` asks of every host before a job goes there: versions, devices, paths, port and interface.

`python -m moeweave.launch.probe '<question as JSON>'` prints the answer as one line of JSON. It opens the port for a
moment on the host that will serve the rendezvous, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeweave.launch import rendezvous, runlog
from moeweave.launch.job import Job

PREFIX = "moeweave-probe: "
# What must be the same everywhere: ranks exchange pickled arguments of these packages, and numbers must agree.
SAME = ("moeweave", "torch", "transformers")


def question(job: Job, node_rank: int) -> dict[str, Any]:
    """What one host is asked."""
    read = [path for path in (job.directory, job.code_dir, job.setup) if path and job.code == "shared"]
    return dict(
        read=read,
        write=[job.run_dir] if job.code == "shared" else [],
        port=job.port if node_rank == 0 and job.nodes > 1 else None,
        interface=job.interface,
        devices=0 if job.cpu else job.ranks_per_node,
    )


def words(job: Job, node_rank: int) -> list[str]:
    """The command line that asks it."""
    return [job.python, "-m", "moeweave.launch.probe", json.dumps(question(job, node_rank))]


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """This host's facts, and in `problems` what of `asked` does not hold here."""
    kind, count = _devices()
    found = [*_path_problems(asked["read"], asked["write"]), *_network_problems(asked["interface"], asked["port"])]
    if count < asked["devices"]:
        found.append(
            f"has {count} accelerators and needs {asked['devices']}: lower ranks_per_node, or use mesh.device=cpu"
        )
    facts = dict(host=socket.gethostname(), versions=runlog.versions(), device=kind, devices=count)
    return facts | {"problems": found}


def differences(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """Versions that a host has differently."""
    return [
        f"has {name} {there.get(name, 'not installed')}, and this machine {here.get(name, 'not installed')}"
        for name in SAME
        if here.get(name) != there.get(name)
    ]


def read(output: str) -> dict[str, Any] | None:
    """The answer in a host's output, or None where there is none."""
    for line in output.splitlines():
        if line.startswith(PREFIX):
            found: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
            return found
    return None


def problems(found: dict[str, Any] | None, output: str = "") -> list[str]:
    """What a host's answer says against running there; `output` is what it wrote in place of one."""
    if found is None:
        lines = output.strip().splitlines()
        return [f"cannot run the check: {lines[-1] if lines else 'no output'}"]
    return [*differences(runlog.versions(), found["versions"]), *found["problems"]]


def _devices() -> tuple[str, int]:
    import torch

    if not torch.accelerator.is_available():
        return "cpu", 0
    kind = torch.accelerator.current_accelerator()
    return (kind.type if kind is not None else "cpu"), torch.accelerator.device_count()


def _path_problems(readable: list[str], writable: list[str]) -> list[str]:
    found = [f"has no {path} (or may not read it)" for path in readable if not os.access(path, os.R_OK)]
    for path in writable:
        there = next(parent for parent in (Path(path), *Path(path).parents) if parent.exists())
        if not os.access(there, os.W_OK):
            found.append(f"may not write to {there}, where the run folder goes")
    return found


def _network_problems(interface: str | None, port: int | None) -> list[str]:
    address = ""  # every address, only to see whether the port is free: nothing is served
    if interface is not None:
        try:
            address = rendezvous.address_of(interface)
        except OSError as error:
            return [str(error)]
    if port is None:
        return []
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address, port))
        except OSError as error:
            return [f"port={port} cannot be listened on ({error.strerror}): set another port"]
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    (asked,) = sys.argv[1:] if argv is None else argv
    print(PREFIX + json.dumps(answer(json.loads(asked))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
