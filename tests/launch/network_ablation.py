"""What each ingredient of the three-stream schedule gives between nodes: the whole layer over two network namespaces of
this machine, as in `network_bench`, which see. Needs root and iproute2.

    python tests/launch/network_ablation.py             # writes tests/results/network_ablation.json
    python tests/launch/network_ablation.py tokens=256  # arguments of moeweave-bench in place of its own
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from namespaces import why_not
from network_bench import RANKS_PER_NODE, RATE, measure

RESULTS = Path(__file__).parents[1] / "results/network_ablation.json"
ARGUMENTS = [
    "op=moe_layer",
    "ablate=true",
    "backend=hierarchical",
    "codec=fp8",
    "tokens=512",
    "hidden=1024",
    "experts=64",
    "topk=8",
    "expert_hidden=64",
    "shared_hidden=512",
    "dtype=bfloat16",
    "device=cpu",
    "iterations=9",
    "warmup=1",
]
INGREDIENTS = ("rank_local", "by_node", "quantise", "two_planes", "overlap")
KEPT = ("backend", "median", "min", "p95", "gain", "wire_bytes", "network_bytes", "wrong", "sides", "slowdown")


def table(lines: list[dict[str, Any]]) -> str:
    """For the README: the whole layer with all, without each and with none of the ingredients."""
    by_name = {line["backend"]: line for line in lines}
    out = ["| layer with | MB between nodes | ms | least, ms |", "|---|---|---|---|"]
    for name in ("all", *(f"all but {each}" for each in INGREDIENTS), "none"):
        line = by_name[name]
        cells = (line["network_bytes"] / 1e6, line["median"] / 1e3, line["min"] / 1e3)
        shown = name if name in ("all", "none") else name.replace("but ", "but `") + "`"
        out.append(f"| {shown} | {cells[0]:.1f} | {cells[1]:.0f} | {cells[2]:.0f} |")
    return "\n".join(out)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nIts own arguments are {' '.join(ARGUMENTS)}; see moeweave-bench --help for all.")
        return 0
    reason = why_not(("ip", "tc"))
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    lines = [line for line in measure([*ARGUMENTS, *arguments]) if "ablation" in line]
    about = dict(
        link=RATE, nodes=2, ranks_per_node=RANKS_PER_NODE, load=os.getloadavg()[0], context=lines[0]["context"]
    )
    kept = [{name: line.get(name) for name in KEPT} for line in lines]
    RESULTS.write_text(json.dumps(about | {"lines": kept}, indent=1) + "\n")
    print(table(kept))
    print(f"written: {RESULTS}")
    return int(any(line["wrong"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
