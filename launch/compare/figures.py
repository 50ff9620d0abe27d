"""From seconds of single passes to figures: medians, ratios with intervals, utilisation, the table of the README."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moeweave.kernels_ext.tolerance import TOLERANCE
from moeweave.launch.compare.methods import parse, without_overlap
from moeweave.parallel.footprint import Footprint

Row = dict[str, Any]
# Dense bf16 products a second, from NVIDIA's data sheets of the SXM modules (without sparsity).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
AGAIN = " again (A/A)"


def interval(base: list[float], other: list[float], seed: int = 0) -> dict[str, float]:
    """Median of `base` over median of `other`, with a 95 % interval by bootstrap over both.

    Passes of one process vary less than processes do: what an interval leaves out, the repeated method shows.
    """
    rng = np.random.default_rng(seed)
    drawn = [np.median(rng.choice(np.array(times), size=(10_000, len(times))), axis=1) for times in (base, other)]
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return {"ratio": float(np.median(base) / np.median(other)), "low": float(low), "high": float(high)}


def flops_of_token(found: Footprint, config: Any, seq_length: int, what: str) -> float:
    """Products and sums that the model needs a token, recomputation not counted: 2 a parameter that the token passes,
    causal attention over half the sequence, and twice as much again for the gradients; prefill's head sees one token.
    """
    attention = 2 * len(found.layers) * config.num_attention_heads * config.head_dim * seq_length
    if what == "prefill":
        return 2 * (found.active - found.after.cost) + attention
    return 3 * (2 * found.active + attention)


def complete(rows: list[Row], tokens: int, flops: float, dtype: str) -> None:
    """Adds what follows from the seconds: tokens a second and rank, utilisation, ratios.

    rows: as `on_ranks.measure` returned them, with `name`; those that failed have a `reason` instead.
    tokens: of a rank and pass. flops: of a token.

    A method whose first pass differs from the first one's by more than the tolerance of `dtype` gets a reason.
    """
    timed = [row for row in rows if "seconds" in row]
    for row in timed:
        _check(row, timed[0], dtype)
        row["median_seconds"] = float(np.median(row["seconds"]))
        row["tokens_per_second"] = tokens / row["median_seconds"]
        peak = next((value for name, value in PEAK_FLOPS.items() if name in row["device"]), None)
        row["utilisation"] = None if peak is None else row["tokens_per_second"] * flops / peak
    _relate([row for row in timed if "reason" not in row])


def _check(row: Row, first: Row, dtype: str) -> None:
    allowed = TOLERANCE[getattr(torch, dtype)]
    for name in ("loss", "norm"):
        row[f"{name}_off"] = off = abs(row[name] / first[name] - 1)
        if not off <= allowed:
            row["reason"] = f"its first pass differs: {name} {row[name]:.6g}, of {first['name']} {first[name]:.6g}"


def _relate(rows: list[Row]) -> None:
    """`over_rival`: times as fast as transformers' first mesh, both its runs together. `over_plain`: as ours without
    overlap. `over_first`: a method run again, against its first run."""
    rivals = [row for row in rows if parse(_word(row)).rival]
    first = rivals[0]["name"] if rivals else None
    base = [second for row in rivals if _word(row) == first for second in row["seconds"]]
    plain = {str((method.sizes, method.plan)): row for row in rows if not (method := parse(_word(row))).rival}
    for row in rows:
        method = parse(_word(row))
        if row["name"].endswith(AGAIN):
            before = next((other for other in rows if other["name"] == method.name), None)
            row |= {} if before is None else {"over_first": interval(before["seconds"], row["seconds"])}
        elif base and row["name"] != first:
            row["over_rival"] = interval(base, row["seconds"])
        other = plain.get(str(without_overlap(method))) if "overlap" in method.plan else None
        if other is not None:
            row["over_plain"] = interval(other["seconds"], row["seconds"])


def _word(row: Row) -> str:
    return str(row["name"]).removesuffix(AGAIN)


def markdown(result: dict[str, Any]) -> str:
    """The README's table of a result."""
    heads = (
        "mesh and plan",
        "tokens/s a rank",
        "memory, GB",
        "utilisation",
        "times transformers'",
        "95 %",
        "times the same without overlap",
    )
    lines = [_title(result), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(_cells(row, len(heads)))} |" for row in result["methods"]]
    return "\n".join(lines)


def _title(result: dict[str, Any]) -> str:
    device = next((row["device"] for row in result["methods"] if "device" in row), "no device")
    pass_ = "Training steps (forward, backward, AdamW)" if result["what"] == "train" else "Prefill"
    recompute = ", recompute" if result["what"] == "train" and result["recompute"] else ""
    return (
        f"{pass_} of {result['model']} with {result['layers']} layers, {result['sequences']} sequences of "
        f"{result['seq_length']} a rank, {result['dtype']}{recompute}, {result['ranks']} x {device}, "
        f"{result['steps']} passes:"
    )


def _cells(row: Row, count: int) -> list[str]:
    name = row["name"].replace("hf:", "transformers ").replace(":", ", ")
    if "reason" in row:
        return [name, row["reason"].replace("|", "/"), *[""] * (count - 2)]
    memory, used = row["peak_bytes"], row["utilisation"]
    rival = row.get("over_rival") or row.get("over_first")
    plain = row.get("over_plain")
    return [
        name,
        f"{row['tokens_per_second']:,.0f}",
        "" if memory is None else f"{memory / 1e9:.1f}",
        "" if used is None else f"{100 * used:.1f} %",
        "" if rival is None else f"{rival['ratio']:.2f}",
        "" if rival is None else f"{rival['low']:.2f} - {rival['high']:.2f}",
        "" if plain is None else f"{plain['ratio']:.2f}",
    ]
