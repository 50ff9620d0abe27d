"""curves.png: the loss of every step, and how the load was spread over experts at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MAX_LABELLED = 16  # more experts or layers than this get no number in their cell


def draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the lines of metrics.jsonl to `path`; without experts, or before loads were logged, the loss alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = [line["load"] for line in lines if line.get("load")]
    figure = Figure(figsize=(12 if loads else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if loads else 1, width_ratios=[1, 1.25] if loads else [1], squeeze=False)[0]
    _draw_loss(axes[0], lines)
    if loads:
        _draw_load(figure, axes[1], loads)
    figure.suptitle(title)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(path)


def _draw_loss(axis: Any, lines: list[dict[str, Any]]) -> None:
    found = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
    if not found:
        return
    steps, losses = [step for step, _ in found], [loss for _, loss in found]
    axis.plot(steps, losses, color="#b9c4d6", linewidth=1, label="each step")
    window = max(1, min(10, len(losses) // 5))
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = steps[window // 2 : window // 2 + len(mean)]
        axis.plot(middle, mean, color="#1f4e9c", linewidth=2, label=f"mean of {window}")
    axis.set(xlabel="step", ylabel="loss (nats per token)", title=f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def _draw_load(figure: Any, axis: Any, loads: list[dict[str, list[int]]]) -> None:
    """A row per layer, a column per expert; 1.0 is the mean load. Layers with fewer experts leave cells blank."""
    from matplotlib.colors import TwoSlopeNorm

    recent = loads[-max(1, len(loads) // 4) :]
    layers = list(recent[-1])
    num_experts = max(len(load) for load in recent[-1].values())
    share = np.full((len(layers), num_experts), np.nan)
    for row, layer in enumerate(layers):
        total = np.array([load[layer] for load in recent], dtype=np.float64).sum(axis=0)
        share[row, : len(total)] = total / max(total.mean(), 1e-9)
    top = max(2.0, float(np.nanmax(share)))
    image = axis.imshow(share, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, top), aspect="auto")
    axis.set(xlabel="expert", ylabel="layer", title="load per expert, last quarter of the run (1.0 = mean)")
    axis.set_yticks(range(len(layers)), [_short(layer) for layer in layers])
    if num_experts <= MAX_LABELLED:
        axis.set_xticks(range(num_experts))
        if len(layers) <= MAX_LABELLED:
            for (row, expert), value in np.ndenumerate(share):
                if not np.isnan(value):
                    far = value > 1.0 + 0.6 * (top - 1.0) or value < 0.35
                    axis.text(expert, row, f"{value:.2f}", ha="center", va="center", color="white" if far else "black")
    figure.colorbar(image, ax=axis, fraction=0.04)


def _short(layer: str) -> str:
    """model.layers.3.mlp.experts -> 3, where there is one number; else the name."""
    numbers = [part for part in layer.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else layer
