"""What a dispatcher loses when fewer multiprocessors hold the link: a line each, and a picture of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeweave.launch.schema import BenchConfig


def budgets_of(config: BenchConfig, factory: Callable[..., Any]) -> list[int | None]:
    """The numbers of multiprocessors that a backend runs with, [None] for its own or where it takes no number."""
    takes = "num_sms" in inspect.signature(factory).parameters
    return list(config.num_sms) if takes and config.num_sms else [None]


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Time over the number of multiprocessors, a curve for each operation, backend and shape; none without lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if "num_sms" in line and "median" in line:
            backend = line["backend"].removesuffix(f" {line['num_sms']} SMs")
            curves.setdefault(f"{line['op']} {backend} {line['label']}", []).append((line["num_sms"], line["median"]))
    if not curves:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
    axis.set(xlabel="multiprocessors that hold the link", ylabel="time (us)", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
