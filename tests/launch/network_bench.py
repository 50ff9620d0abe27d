"""Dispatch over a slow network: two nodes of four ranks as network namespaces of this machine, joined by a link of 200
Mbit/s each way. Needs root and iproute2.

    python tests/launch/network_bench.py            # writes tests/results/network_dispatch.json
    python tests/launch/network_bench.py tokens=256 # arguments of moeweave-bench in place of its own
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from namespaces import over_nodes, shape, two_networks, why_not

RATE = "200mbit"
RANKS_PER_NODE = 4
RESULTS = Path(__file__).parents[1] / "results/network_dispatch.json"
ARGUMENTS = [
    "op=dispatch",
    "backend=[alltoall,allgather,hierarchical]",
    "codec=[none,fp8]",
    "tokens=1024",
    "hidden=1024",
    "experts=256",
    "topk=8",
    "dtype=bfloat16",
    "device=cpu",
    "iterations=7",
    "warmup=1",
]
KEPT = ("op", "backend", "label", "dtype", "ranks", "median", "min", "p95", "wire_bytes", "network_bytes", "wrong")


def measure(
    arguments: list[str], rate: str | None = RATE, ranks_per_node: int = RANKS_PER_NODE
) -> list[dict[str, Any]]:
    """The lines of a moeweave-bench over two namespaces; RuntimeError with both nodes' output where one failed."""
    with tempfile.TemporaryDirectory() as folder, two_networks() as names:
        if rate is not None:
            shape(names, rate)
        over_nodes(names, ranks_per_node, ["-m", "moeweave.launch.bench", *arguments, f"out={folder}"], timeout=1500)
        return [json.loads(line) for line in (Path(folder) / "bench.jsonl").read_text().splitlines()]


def _alone(arguments: list[str]) -> list[dict[str, Any]]:
    """The same shape over memory alone, all ranks on one node: what copies cost on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moeweave.launch.bench", *arguments, f"out={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
        return [json.loads(line) for line in (Path(folder) / "bench.jsonl").read_text().splitlines()]


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nIts own arguments are {' '.join(ARGUMENTS)}; see moeweave-bench --help for all.")
        return 0
    reason = why_not(("ip", "tc"))
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    lines = measure([*ARGUMENTS, *arguments])
    alone = _alone([*ARGUMENTS, *arguments, "backend=onesided", "codec=none", f"ranks={2 * RANKS_PER_NODE}"])
    found = {
        "link": RATE,
        "nodes": 2,
        "ranks_per_node": RANKS_PER_NODE,
        "context": lines[0]["context"],
        "lines": [{name: line.get(name) for name in KEPT} for line in [*lines, *alone] if line["op"] != "peak"],
    }
    for line in found["lines"]:
        times = f"{line['median'] / 1e3:8.1f} ms (least {line['min'] / 1e3:.1f})"
        print(f"{line['backend']:>20} {times} {line['network_bytes'] or 0:>12} bytes between nodes")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {RESULTS}")
    return int(any(line["wrong"] for line in found["lines"]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
