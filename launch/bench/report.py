"""What comes out: nccl-tests' table, JSON lines, CSV, a picture, and the comparison of two runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moeweave.launch.bench import ablation, budget, hccl, timeline
from moeweave.launch.schema import ConfigError

Line = dict[str, Any]
KEY = ("op", "backend", "label", "size", "dtype", "in_place", "ranks", "routing", "device", "graph", "flush", "average")
COLUMNS = (
    "op", "backend", "label", "size", "count", "dtype", "redop", "in_place", "ranks", "graph", "median", "min", "mean",
    "p95", "p99", "host", "kernel", "kernel_least", "algbw", "busbw", "logical_bytes", "wire_bytes", "network_bytes",
    "of_peak", "ratio", "exposed", "concurrent", "wrong",
)  # fmt: skip
TIMES = ("median", "min", "p95", "p99", "host")  # columns of microseconds


def relate(lines: list[Line]) -> None:
    """Adds to each line `ratio`, the first backend's time over its own on the same size, and `of_peak`, its bandwidth
    over the highest of the run's lines for `peak` and `raw`."""
    first: dict[tuple[Any, ...], float] = {}
    peak = max((line["busbw"] for line in lines if line["op"] in ("peak", "raw") and "busbw" in line), default=None)
    for line in lines:
        key = tuple(line[name] for name in ("op", "label", "size", "in_place"))
        time = line.get("median")
        if time is not None:
            line["ratio"] = first.setdefault(key, time) / time
            line["of_peak"] = None if peak is None else line["busbw"] / peak


def table(lines: Iterable[Line], context: Line) -> str:
    """The lines as nccl-tests print them; times in microseconds, sizes in bytes, bandwidths in GB/s (10^9)."""
    rows = list(lines)
    how = ", iterations back to back" if rows[0].get("average") else ""
    out = [f"# {context['device_name']}, {context['ranks']} ranks, torch {context['versions']['torch']}{how}"]
    for op in dict.fromkeys(line["op"] for line in rows):
        mine = [line for line in rows if line["op"] == op]
        if mine[0].get("device") == "npu" and op in hccl.NAMES:
            out += hccl.table(op, mine)
        times = (*TIMES, "kernel") if any("kernel" in line for line in mine) else TIMES
        out += ["#", f"# {op}", _header(op, times), *(_row(line, times) for line in mine)]
        out += _matrices(mine) if op in ("pairs", "topology") else []
    out += rows[0].get("topology") or []
    out += ablation.table(rows)
    wrong = sum(line["wrong"] for line in rows)
    return "\n".join([*out, f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}"])


def _matrices(lines: list[Line]) -> list[str]:
    """GB/s from each rank to each other, a matrix for each backend and size."""
    out = []
    pairs = [line for line in lines if "->" in line["label"] and "busbw" in line]
    for backend, size in dict.fromkeys((line["backend"], line["size"]) for line in pairs):
        values: list[list[Any]] = [[None] * pairs[0]["ranks"] for _ in range(pairs[0]["ranks"])]
        for line in pairs:
            if (line["backend"], line["size"]) == (backend, size):
                source, target = map(int, line["label"].split("->"))
                values[source][target] = line["busbw"]
        out += matrix(f"GB/s, {backend}, {size} bytes", values)
    return out


def matrix(title: str, values: list[list[Any]]) -> list[str]:
    """Lines of a square table whose rows are from and whose columns are to."""

    def cell(each: Any) -> str:
        return "-" if each is None else f"{each:.2f}" if isinstance(each, float) else str(each)

    head = [f"# {title}, from (down) to (across)", "#      " + "".join(f"{rank:>10}" for rank in range(len(values)))]
    return head + [f"# {rank:>4} " + "".join(f"{cell(each):>10}" for each in row) for rank, row in enumerate(values)]


def _header(op: str, times: Sequence[str]) -> str:
    first = f"{'size':>12} {'count':>12} {'type':>9} {'redop':>6} {'place':>5} {'backend':>22}"
    shown = " ".join(f"{'time' if name == 'median' else name:>10}" for name in times)
    figures = f"{shown} {'algbw':>8} {'busbw':>8} {'#wrong':>7}"
    if op == "overlap":
        return f"# {first} {figures} {'exposed':>10} {'concurrent':>10}  sides, and how much slower each is than alone"
    return f"# {first} {figures} {'ratio':>6} {'peak':>5} {'logical':>12} {'wire':>12}"


def _row(line: Line, times: Sequence[str]) -> str:
    place = "in" if line["in_place"] else "out"
    first = f"{line['size']:>12} {line['count']:>12} {line['dtype']:>9} {line['redop']:>6} {place:>5}"
    first += f" {line['backend']:>22}"
    numbers = " ".join(f"{_short(line.get(name), '.2f'):>10}" for name in times)
    speeds = " ".join(f"{_short(line.get(name), '.3f'):>8}" for name in ("algbw", "busbw"))
    start = f"  {first} {numbers} {speeds} {line['wrong']:>7}"
    if line["op"] == "overlap":
        slower = line.get("slowdown", {})
        sides = " + ".join(
            f"{side} {slower[side]:.2f}x" if side in slower else side for side in line["label"].split(" + ")
        )
        return f"{start} {_short(line.get('exposed'), '.2f'):>10} {_short(line.get('concurrent'), '.0%'):>10}  {sides}"
    ratio, peak = _short(line.get("ratio"), ".2f"), _short(line.get("of_peak"), ".0%")
    sent = " ".join(f"{_short(line[name], 'd'):>12}" for name in ("logical_bytes", "wire_bytes"))
    how = f"{line['label']} graph" if line.get("graph") else line["label"]
    return f"{start} {ratio:>6} {peak:>5} {sent}  {how}".rstrip()


def _short(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def write(lines: list[Line], folder: Path) -> None:
    """bench.jsonl (appended), and bench.csv and bench.png of this run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "bench.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    with (folder / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    timeline.write(lines, folder)
    budget.draw(lines, folder / "num_sms.png")
    _draw(
        [line for line in lines if "median" in line and line["op"] not in ("peak", "overlap", "topology")],
        folder / "bench.png",
    )


def _draw(lines: list[Line], path: Path) -> None:
    """Bus bandwidth and time over size, a curve for each operation, backend and place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    curves: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        curves.setdefault((line["op"], line["backend"], line["in_place"], line["label"]), []).append(line)
    for (op, backend, in_place, label), points in curves.items():
        name = f"{op} {backend}{' in place' if in_place else ''} {label}"
        for axis, figure_name in zip(axes, ("busbw", "median"), strict=True):
            sizes, values = [point["size"] for point in points], [point[figure_name] for point in points]
            axis.plot(sizes, values, marker="o", markersize=3, label=name)
    axes[0].set(xlabel="size (bytes)", ylabel="bus bandwidth (GB/s)", xscale="log")
    axes[1].set(xlabel="size (bytes)", ylabel="time (us)", xscale="log", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    if curves:
        axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def read(path: str) -> dict[tuple[Any, ...], Line]:
    """The lines of a bench.jsonl by what they measured; the last of several. Raises ConfigError."""
    if not Path(path).is_file():
        raise ConfigError(f"compare: {path} does not exist. Name two bench.jsonl files.")
    try:
        lines = [json.loads(text) for text in Path(path).read_text().splitlines()]
        return {tuple(line.get(name) for name in KEY): line for line in lines}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"compare: {path} holds something else than moeweave-bench's results ({error}).") from error


def compare(old: str, new: str, threshold: float) -> tuple[str, int]:
    """A table of what both files measured, and how many lines became slower by more than `threshold`, or wrong."""
    before, after = read(old), read(new)
    common = [key for key in after if key in before and key[0] != "peak"]
    if not common:
        raise ConfigError(f"compare: {old} and {new} have no measurement in common. Run both with the same arguments.")
    rows, bad = [f"{'measurement':<60} {'old us':>10} {'new us':>10} {'change':>8}"], 0
    for key in common:
        was, now = before[key].get("median"), after[key].get("median")
        name = " ".join(str(part) for part in key[:4] if part != "")
        if was is None or now is None:
            bad += now is None
            rows.append(
                f"{name:<60} {_short(was, '.2f'):>10} {_short(now, '.2f'):>10} {'WRONG' if now is None else '':>8}"
            )
            continue
        change = now / was - 1
        bad += change > threshold
        rows.append(f"{name:<60} {was:>10.2f} {now:>10.2f} {change:>+8.1%}{'  SLOWER' if change > threshold else ''}")
    for key in before:
        if key not in after and key[0] != "peak":
            bad += 1
            rows.append(f"{' '.join(str(part) for part in key[:4] if part != ''):<60} {'MISSING':>30}")
    rows.append(f"{len(common)} compared, {bad} slower by more than {threshold:.0%} wrong or missing")
    return "\n".join(rows), bad
