"""`python -m moeweave.launch.bench.summary FOLDER/bench.jsonl --out NAME`: what `bench.reference` measured, in short.

Prints a Markdown table of dispatch and combine, shape by shape: the one-sided exchange beside the NCCL baseline and the
bytes that must cross, all of one run. Writes NAME.json (all figures, without single iterations) and NAME.png.
With `--raw` it prints the bytes that must cross alone, shape by shape: written by cores, by copy engines, and by the
collective. `summary NAME.json --raw` does so of figures that it wrote before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moeweave.launch.bench.shapes import SHAPES

Line = dict[str, Any]
OURS, BASELINE = "onesided_static", "alltoall"
RAW = {"push": "cores write", "dma": "copy engines", "torch": "all-to-all (NCCL)"}
BARS = {BASELINE: "alltoall (NCCL)", OURS: "onesided", "raw": "the bytes that must cross, alone"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, 2 for a file without such figures."""
    parser = argparse.ArgumentParser(prog="python -m moeweave.launch.bench.summary", description=__doc__)
    parser.add_argument("lines", type=Path, help="bench.jsonl that bench.reference wrote, or NAME.json")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    parser.add_argument("--raw", action="store_true", help="print the table of raw bytes")
    parser.add_argument("--sha", help="commit, where the measuring machine had no git")
    args = parser.parse_args(argv)
    if args.out is None and not args.raw:
        parser.error("--out or --raw is needed")
    lines = read(args.lines)
    if args.raw:
        return _print_raw(lines, args.lines)
    found = list(rows(lines))
    if not found:
        print(f"summary: {args.lines} has no dispatch by {OURS} and {BASELINE}. Run bench.reference.", file=sys.stderr)
        return 2
    context = {key: lines[0]["context"][key] for key in ("device_name", "ranks", "versions", "git")}
    if args.sha is not None:
        context["git"] = {"sha": args.sha}
    kept = [{key: value for key, value in line.items() if key not in ("context", "times")} for line in lines]
    args.out.with_suffix(".json").write_text(json.dumps({**context, "lines": kept}, indent=1) + "\n")
    print(markdown(found))
    draw(found, context, args.out.with_suffix(".png"))
    return 0


def read(path: Path) -> list[Line]:
    """The lines of a bench.jsonl or of a NAME.json; none where there is no such file."""
    text = path.read_text() if path.is_file() else ""
    if path.suffix == ".json" and text:
        found: list[Line] = json.loads(text)["lines"]
        return found
    return [json.loads(line) for line in text.splitlines()]


def _print_raw(lines: list[Line], path: Path) -> int:
    table = raw_markdown(lines)
    if len(table) == 2:
        print(f"summary: {path} has no op=raw with a shape. Run bench.reference.", file=sys.stderr)
        return 2
    print("\n".join(table))
    return 0


def raw_markdown(lines: list[Line]) -> list[str]:
    """A line for each shape: MB out of a rank; for each way microseconds (median, least) and GB/s of the median.

    Push by a given number of programs has lines of its own.
    """
    heads = ["shape", "MB", *(head for name in RAW.values() for head in (f"{name}, us", "GB/s"))]
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    timed = [line for line in lines if line["op"] == "raw" and line["label"] and "median" in line]
    shown: dict[tuple[str, int | None], dict[str, Line]] = {}
    for line in timed:
        shown.setdefault((line["label"], line.get("programs")), {}).setdefault(line["backend"], line)
    for (shape, programs), ways in shown.items():
        any_line = next(iter(ways.values()))
        name = shape + (f", {programs} programs" if programs else "") + (", graph" if any_line["graph"] else "")
        cells = [name, f"{any_line['size'] / 1e6:.1f}"]
        for way in RAW:
            found = ways.get(way)
            cells += ["", ""] if found is None else [_cell(found), f"{found['busbw']:.0f}"]
        table.append(f"| {' | '.join(cells)} |")
    return table


def _cell(line: Line) -> str:
    return f"{line['median']:.1f} ({line['min']:.1f})"


def rows(lines: list[Line]) -> Iterator[Line]:
    """For each shape and operation the median microseconds: the baseline, ours, ours in fp8, and the raw bytes."""
    for shape in SHAPES:
        own = [at for at, line in enumerate(lines) if line["label"] == shape and line["backend"] == OURS]
        if not own:
            continue
        # A run first writes the raw bytes of its shape.
        raw = next(line for line in reversed(lines[: own[0]]) if line["op"] == "peak" and line["backend"] == "push")
        for op in ("dispatch", "combine"):
            timed = {line["backend"]: line["median"] for line in lines if (line["op"], line["label"]) == (op, shape)}
            row = dict(
                shape=shape, op=op, graph=lines[own[0]]["graph"], raw=raw["median"], fp8=timed.get(f"{OURS} fp8")
            )
            yield row | {name: timed[name] for name in (BASELINE, OURS)}


def markdown(found: list[Line]) -> str:
    """One line for each shape and operation; times in microseconds."""
    heads = (
        "shape",
        "operation",
        BARS[BASELINE],
        BARS[OURS],
        "NCCL / onesided",
        "raw",
        "onesided / raw",
        "onesided, fp8",
    )
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found:
        theirs, ours, raw = row[BASELINE], row[OURS], row["raw"]
        cells = [row["shape"] + (", graph" if row["graph"] else ""), row["op"], f"{theirs:,.0f}", f"{ours:,.1f}"]
        cells += [f"{theirs / ours:.1f}", f"{raw:,.1f}", f"{ours / raw:.2f}"]
        text.append(f"| {' | '.join([*cells, '' if row['fp8'] is None else format(row['fp8'], ',.1f')])} |")
    return "\n".join(text)


def draw(found: list[Line], context: dict[str, Any], path: Path) -> None:
    """Bars for each shape and operation, on a logarithmic axis of time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, op in zip(figure.subplots(1, 2, sharey=True), ("dispatch", "combine"), strict=True):
        some = [row for row in found if row["op"] == op]
        for index, (name, label) in enumerate(BARS.items()):
            axes.bar([i + 0.27 * (index - 1) for i in range(len(some))], [row[name] for row in some], 0.25, label=label)
        axes.set_xticks(range(len(some)), [row["shape"] for row in some], rotation=25, ha="right")
        axes.set(yscale="log", title=op)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("microseconds, the slowest rank's median")
    figure.axes[0].legend()
    figure.suptitle(f"{context['ranks']} ranks, {context['device_name']}, bf16")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
