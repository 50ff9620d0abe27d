"""Bytes and time of a dispatch on 8 to 2048 ranks by the closed form of `comm.cost`, written and drawn.

python tests/comm/network_model.py   # writes tests/results/network_model.json and network_model.png
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeweave.comm.cost import MODELLED, Links, Tokens, dispatch_cost
from moeweave.comm.nodes import Nodes

RESULTS = Path(__file__).parents[1] / "results"
RANKS_PER_NODE = 8
RANKS = [2**power for power in range(3, 12)]
# Eight accelerators a node: a 400 Gbit/s card, 300 GB/s of the fast links and 1.5 TB/s of decoded rows each.
LINKS = Links(network=8 * 5e10, local=8 * 3e11, latency=5e-6, decode=8 * 1.5e12)
SHAPE = dict(tokens=4096, hidden=7168, experts=2048, top_k=8)
FORMATS = ("none", "fp8")


def modelled() -> list[dict[str, Any]]:
    """A line for each dispatcher, format and number of ranks."""
    return [
        {"dispatcher": name, "format": form, "ranks": ranks}
        | asdict(dispatch_cost(name, Tokens(**SHAPE, format=form), Nodes(ranks // RANKS_PER_NODE, 8), LINKS))
        for name in MODELLED
        for form in FORMATS
        for ranks in RANKS
    ]


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Bytes that leave an average rank's node, and time, over the number of ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for name, color in zip(MODELLED, ("C0", "C1", "C2", "C3"), strict=True):
        for form, style in zip(FORMATS, ("-", "--"), strict=True):
            mine = [line for line in lines if (line["dispatcher"], line["format"]) == (name, form)]
            label = name if form == "none" else f"{name} {form}"
            for axis, field, unit in zip(axes, ("network_bytes", "seconds"), (1e-6, 1e3), strict=True):
                axis.plot(
                    [line["ranks"] for line in mine],
                    [line[field] * unit for line in mine],
                    style,
                    color=color,
                    label=label,
                )
    axes[0].set(ylabel="MB a rank between nodes")
    axes[1].set(ylabel="dispatch, ms")
    for axis in axes:
        axis.set(xlabel="ranks, 8 a node", xscale="log", yscale="log", xticks=RANKS, xticklabels=RANKS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    lines = modelled()
    about = {"shape": SHAPE, "links": asdict(LINKS), "ranks_per_node": RANKS_PER_NODE, "lines": lines}
    (RESULTS / "network_model.json").write_text(json.dumps(about, indent=1) + "\n")
    draw(lines, RESULTS / "network_model.png")
    for line in lines:
        if line["ranks"] in (16, 64, 512, 2048):
            name = f"{line['dispatcher']} {line['format']}"
            print(
                f"{line['ranks']:>5} {name:>18} {line['network_bytes'] / 1e6:8.0f} MB {line['seconds'] * 1e3:8.2f} ms"
            )


if __name__ == "__main__":
    main()
