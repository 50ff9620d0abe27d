"""Nodes made up on one machine: a topology file that says which ranks share memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeweave.comm.topology import Topology


def topology_of(node_W: Sequence[int]) -> Topology:
    """Of CPU ranks on these nodes, with bandwidths by which `auto` would take the all-gather."""
    ranks = range(len(node_W))

    def pairs(same: object, other: object) -> list[list]:
        return [[None if a == b else same if node_W[a] == node_W[b] else other for b in ranks] for a in ranks]

    return Topology(
        device="cpu",
        device_names=["cpu"] * len(node_W),
        hosts=[f"host{node}" for node in node_W],
        links=pairs("memory", "network"),
        peer_access=pairs(True, False),
        pair_gbps=pairs(2.5, 0.025),
        all_to_all_gbps=1.0,
        all_gather_gbps=100.0,
        all_to_all_us=150.0,
        measured_bytes=1 << 20,
    )


def write_nodes(folder: Path, node_W: Sequence[int]) -> str:
    """The path of such a file."""
    path = folder / f"nodes{'-'.join(map(str, node_W))}.json"
    topology_of(node_W).save(path)
    return str(path)
