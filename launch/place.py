"""`python -m moeweave.launch.place`: which rank is to hold which experts, from the load that a run has logged.

Reads `load` from the last lines of the run's metrics.jsonl and writes a file for `plan.placement`. A run goes on with
it from its newest checkpoint, which does not depend on a placement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moeweave.launch.runlog import RunFolder, read_metrics
from moeweave.parallel.placement import invert, place_by_load, rank_loads

EXAMPLES = """\
example:
  moeweave-train experiment=quickstart run.dir=runs/mine
  python -m moeweave.launch.place runs/mine --ep 2 --out runs/mine/placement.json
  moeweave-train experiment=quickstart run.dir=runs/mine steps=400 plan.placement=runs/mine/placement.json
  python -m moeweave.launch.place runs/mine --ep 2 --slots 12 --out runs/mine/placement.json  # with replicas
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 written, 2 refused, with the reason on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        load = logged_load(arguments.run, arguments.last)
        placed = place_by_load(
            load, arguments.ep, arguments.slots, num_groups=arguments.groups, num_nodes=arguments.nodes
        )
    except ValueError as error:
        print(f"moeweave.launch.place: refused: {error}", file=sys.stderr)
        return 2
    try:
        arguments.out.write_text(json.dumps(placed) + "\n")
    except OSError as error:
        print(f"moeweave.launch.place: refused: --out {arguments.out}: {error.strerror}", file=sys.stderr)
        return 2
    Console().print(_table(load, placed, arguments.ep))
    print(f"written to {arguments.out}; use it with plan.placement={arguments.out}")
    return 0


def logged_load(run: Path, last: int) -> dict[str, list[int]]:
    """Routes of each expert by layer, summed over the last `last` steps of a run that logged them.

    Raises:
        ValueError: no run in the folder, or one that logged no load.
    """
    folder = RunFolder(run)
    lines = [line["load"] for line in read_metrics(folder) if line.get("load")] if folder.metrics.exists() else []
    if not lines:
        raise ValueError(f"{run} has no load of experts in {folder.metrics.name}. Name the folder of a training run.")
    lines = lines[-last:]
    return {path: [sum(counts) for counts in zip(*(line[path] for line in lines), strict=True)] for path in lines[0]}


def _table(load: dict[str, list[int]], placed: dict[str, list[int]], ep: int) -> Table:
    table = Table("experts", "by id", "placed", title="load of the fullest rank, of the mean")
    for path, counts in load.items():
        load_1E = torch.tensor([counts])
        by_id = [] if len(counts) % ep else [_fullest(load_1E, list(range(len(counts))), ep)]
        table.add_row(path, *(by_id or ["-"]), _fullest(load_1E, placed[path], ep))
    return table


def _fullest(load_1E: torch.Tensor, slots: list[int], ep: int) -> str:
    loads = rank_loads(load_1E, invert(torch.tensor([slots]), load_1E.shape[1]), ep)
    return f"{float(loads.max() / loads.mean()):.3f}"


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moeweave.launch.place",
        description="Places experts on ranks by the load that a run has logged.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--ep", type=_whole, required=True, help="ranks that share out the experts")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--last", type=_whole, default=10, help="lines with a load to sum, from the end (10)")
    parser.add_argument("--slots", type=int, help="experts that the ranks hold together; more than there are: replicas")
    parser.add_argument("--groups", type=int, default=1, help="groups that routing chooses by (1)")
    parser.add_argument("--nodes", type=int, default=1, help="hosts that the ranks lie on (1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
