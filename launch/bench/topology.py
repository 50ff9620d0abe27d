"""`op=topology`: who is where, what joins them, and what the links give; written to the file that `auto` reads."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from moeweave.comm.engines import shares_memory
from moeweave.comm.peers import host_name
from moeweave.comm.topology import Topology
from moeweave.launch import runlog
from moeweave.launch.bench import collectives, raw
from moeweave.launch.bench.case import Case
from moeweave.launch.bench.report import matrix
from moeweave.launch.schema import BenchConfig
from moeweave.parallel.mesh import Mesh

Line = dict[str, Any]
LATENCY = "all_to_all, smallest"


@dataclass(frozen=True)
class Place:
    """Where a rank is: its host, its device there, and whom of the host's devices it reaches, and how.

    memory: of CPU ranks, the same where they can share memory, as hosts of one name need not; "" where nothing tells.
    """

    host: str
    memory: str
    index: int
    name: str
    reaches: list[bool]
    links: list[str]


def check(op: str, config: BenchConfig, ranks: int) -> None:
    """Raise ConfigError where the sizes cannot be shared out."""
    for size in (config.min_size, config.max_size):
        collectives.check("all_to_all", replace(config, min_size=size, max_size=size), ranks)


def cases(op: str, config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """Every pair, then all-to-all and all-gather of the largest size, and the smallest all-to-all; and where ranks can
    write into each other's memory, both planes."""
    smallest = replace(config, max_size=config.min_size, in_place=False)
    largest = replace(config, min_size=config.max_size, in_place=False)
    for case in collectives.cases("pairs", largest, mesh):
        yield replace(case, op=op)
    for name, sizes, label in (
        ("all_to_all", largest, "all_to_all"),
        ("all_gather", largest, "all_gather"),
        ("all_to_all", smallest, LATENCY),
    ):
        for case in collectives.cases(name, sizes, mesh):
            yield replace(case, op=op, label=label)
    if is_one_memory(mesh) and mesh.device.type in ("cpu", "cuda"):
        for case in raw.cases(op, replace(largest, backend=list(raw.PLANES), shape=None), mesh):
            yield replace(case, label=case.backend)


def places(mesh: Mesh) -> list[Place]:
    """Of every rank, in rank order; a collective."""
    found: list[Any] = [None] * mesh.world
    dist.all_gather_object(found, _place(mesh.device), group=mesh.token_group)
    return found


def is_one_memory(mesh: Mesh) -> bool:
    """Whether every rank can write into every other's memory; a collective."""
    if mesh.device.type == "cpu":
        return shares_memory(mesh.token_group)
    where = places(mesh)
    return all(access is not False for row in _access(where, mesh.device.type) for access in row)


def topology(lines: list[Line], mesh: Mesh, config: BenchConfig) -> Topology | None:
    """What the lines of this operation say, for the first backend; None where a result was wrong. A collective."""
    where = places(mesh)
    used = {(config.backends or ["torch"])[0], *raw.PLANES}
    mine = [line for line in lines if line["op"] == "topology" and line["backend"] in used]
    if any(line["wrong"] for line in mine):
        return None
    by_label = {line["label"]: line for line in mine}
    ranks = range(mesh.world)
    pairs = [[by_label[f"{a}->{b}"]["busbw"] if a != b else None for b in ranks] for a in ranks]
    return Topology(
        device=mesh.device.type,
        device_names=[place.name for place in where],
        hosts=[place.host for place in where],
        links=[[_link(where[a], where[b], mesh.device.type) if a != b else None for b in ranks] for a in ranks],
        peer_access=_access(where, mesh.device.type),
        pair_gbps=pairs,
        all_to_all_gbps=by_label["all_to_all"]["busbw"],
        all_gather_gbps=by_label["all_gather"]["busbw"],
        all_to_all_us=by_label[LATENCY]["median"],
        measured_bytes=config.max_size,
        **_planes(by_label, mesh, config),
    )


def _planes(by_label: dict[str, Line], mesh: Mesh, config: BenchConfig) -> dict[str, Any]:
    """Rates of both planes, where they were measured."""
    if "push" not in by_label:
        return {}
    sms = 0
    if mesh.device.type == "cuda":
        sms = config.programs or torch.cuda.get_device_properties(mesh.device).multi_processor_count
    return {"push_gbps": by_label["push"]["busbw"], "dma_gbps": by_label["dma"]["busbw"], "push_sms": sms}


def table(found: Topology) -> list[str]:
    """What a person reads of it."""
    out = [f"# {found.num_ranks} ranks on {found.num_hosts} host(s), {found.device}"]
    names = zip(found.hosts, found.device_names, strict=True)
    out += [f"#   rank {rank}: {host}, {name}" for rank, (host, name) in enumerate(names)]
    words = {None: None, True: "yes", False: "no"}
    return (
        out
        + matrix("link", found.links)
        + matrix("peer access", [[words[access] for access in row] for row in found.peer_access])
    )


def _place(device: torch.device) -> Place:
    host = socket.gethostname()
    try:
        memory = host_name()
    except OSError:
        memory = ""
    if device.type != "cuda":
        return Place(host, memory, device.index or 0, device_name(device), [], [])
    index = torch.cuda.current_device()
    count = torch.cuda.device_count()
    reaches = [other == index or torch.cuda.can_device_access_peer(index, other) for other in range(count)]
    links = _driver_links()
    # With some devices hidden, the driver's numbers are not torch's.
    return Place(host, memory, index, device_name(device), reaches, links.get(index, []) if len(links) == count else [])


def device_name(device: torch.device) -> str:
    """The product's name, of the CPU as well."""
    return runlog.processor() if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def _driver_links() -> dict[int, list[str]]:
    """The rows of `nvidia-smi topo -m` by GPU number; empty where there is no such program."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_links(done.stdout)


def parse_links(text: str) -> dict[int, list[str]]:
    """`GPU0  X  NV18 ...` lines -> {0: ["X", "NV18", ...]}, as many as the header names GPUs."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    number = max((sum(bool(re.fullmatch(r"GPU\d+", word)) for word in line) for line in lines), default=0)
    rows = [line for line in lines if len(line) > number > 0 and re.fullmatch(r"GPU\d+", line[0])]
    return {int(row[0][3:]): row[1 : number + 1] for row in rows if row[1] != "GPU1"}


def _access(where: list[Place], device: str) -> list[list[bool | None]]:
    def reach(a: Place, b: Place) -> bool:
        if not _is_one_host(a, b, device):
            return False
        return device == "cpu" or (b.index < len(a.reaches) and a.reaches[b.index])

    return [[reach(a, b) if a is not b else None for b in where] for a in where]


def _is_one_host(a: Place, b: Place, device: str) -> bool:
    return a.host == b.host and (device != "cpu" or a.memory == b.memory)


def _link(a: Place, b: Place, device: str) -> str:
    if not _is_one_host(a, b, device):
        return "network"
    if device == "cpu":
        return "memory"
    return a.links[b.index] if b.index < len(a.links) else "unknown"
