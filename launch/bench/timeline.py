"""Pictures of timelines: one PNG and one Chrome trace for each case that has spans."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moeweave.comm.timeline import STREAMS, Span, write_chrome_trace

COLOURS = {"rows": "tab:blue", "results": "tab:cyan", "experts": "tab:red", "router": "tab:orange"}


def write(lines: list[dict[str, Any]], folder: Path) -> list[Path]:
    """timeline-<case>.png and .json of each line with spans; returns the files."""
    written = []
    for line in lines:
        if "spans" in line:
            name = folder / f"timeline-{re.sub(r'[^0-9A-Za-z]+', '-', line['backend'])}"
            spans = [Span(*each) for each in line["spans"]]
            write_chrome_trace(spans, name.with_suffix(".json"))
            draw(spans, name.with_suffix(".png"), f"{line['op']}, {line['backend']}, rank 0")
            written += [name.with_suffix(".json"), name.with_suffix(".png")]
    return written


def draw(spans: list[Span], path: Path, title: str) -> None:
    """One bar a span, one row a stream."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3), layout="constrained")
    axes = figure.subplots()
    begin = min(span.start for span in spans)
    for span in spans:
        left, width = (span.start - begin) * 1e6, (span.end - span.start) * 1e6
        row = STREAMS.index(span.stream)
        axes.barh(row, width, left=left, height=0.7, color=COLOURS.get(span.name, "tab:gray"), alpha=0.7, edgecolor="k")
        axes.text(left + width / 2, row, span.name, ha="center", va="center", fontsize=7, clip_on=True)
    axes.set_yticks(range(len(STREAMS)), STREAMS)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds")
    axes.set_title(title)
    figure.savefig(path, dpi=120)
