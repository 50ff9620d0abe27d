"""`moeweave-inspect`: what moeweave finds in a model and what a mesh would make of it, without allocating any of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from moeweave.launch import report
from moeweave.parallel.adapter import MoEBlock, find_moe_blocks
from moeweave.parallel.hf.build import SIZES, build_model
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.plan import Plan
from moeweave.parallel.sequence import check_sequence, shares_sequence
from moeweave.parallel.suggest import Hardware, Suggestion, suggest

EXAMPLES = """\
examples:
  moeweave-inspect qwen3_moe                      a model type, at the sizes that its config has by default
  moeweave-inspect path/to/config.json            any config; nothing is downloaded, no weight is read
  moeweave-inspect mixtral --dp 8 --ep 8          what each of 8 ranks would hold
  moeweave-inspect deepseek_v3 --dp 64 --ep 32 --dtype bfloat16
  moeweave-inspect olmoe --set num_hidden_layers=2 --set num_experts=16
  moeweave-inspect qwen3_moe --dtype bfloat16 --world 8 --memory 80 --tokens 262144    meshes that would train it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 found and fits, 2 refused, with the reason on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        sizes = MeshSizes(**{field.name: getattr(arguments, field.name) for field in fields(MeshSizes)})
        plan = Plan(data=arguments.data)
        overrides = dict(_override(text) for text in arguments.set)
        dtype = getattr(torch, arguments.dtype)
        model = build_model(arguments.source, overrides, size=arguments.size, device="meta", dtype=dtype)
        blocks = find_moe_blocks(model)
        for block in blocks:
            sizes.check_experts(block.num_experts, block.path)
        if shares_sequence(sizes, plan):
            check_sequence(model, blocks, sizes, plan)
        suggestions = _suggest(model, arguments) if arguments.world else []
    except ValueError as error:
        print(f"moeweave-inspect: refused: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(_heading(model, arguments.source))
    if not blocks:
        console.print("It has no mixture-of-experts blocks: only data parallelism applies.")
    for table in _block_tables(blocks, model):
        console.print(table)
    console.print(_counts(model, blocks))
    if suggestions:
        console.print(_suggested(suggestions, arguments))
        return 0
    for table in (_sharding(model, blocks, sizes, plan), _memory(model, blocks, sizes, plan)):
        console.print(table)
    return 0


def _suggest(model: nn.Module, arguments: argparse.Namespace) -> list[Suggestion]:
    hardware = Hardware(ranks_per_node=arguments.ranks_per_node)
    memory = int(arguments.memory * 2**30)
    return suggest(model, arguments.world, memory, arguments.tokens, sequence=arguments.sequence, hardware=hardware)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeweave-inspect",
        description="Shows the MoE blocks of a model, how they would be spread over a mesh, and the memory of a rank.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a model type of transformers, a config.json, or a folder that holds one")
    parser.add_argument("--size", choices=SIZES, default="given", help="the config's own sizes, or tiny ones")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a config field")
    parser.add_argument("--data", choices=("fsdp2", "ddp"), default="fsdp2", help="engine of the data axes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    ask = parser.add_argument_group("meshes that would train it, fastest by estimate first")
    ask.add_argument("--world", type=int, metavar="N", help="ranks to spread it over; asks for suggestions")
    ask.add_argument("--memory", type=float, default=80, metavar="GIB", help="of a rank (80)")
    ask.add_argument("--tokens", type=int, default=2**18, metavar="N", help="of all ranks in a step (262144)")
    ask.add_argument("--sequence", type=int, default=4096, metavar="N", help="tokens of a sequence (4096)")
    ask.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="ranks with fast links between (8)")
    axes = parser.add_argument_group("mesh sizes, all 1 by default")
    for field in fields(MeshSizes):
        axes.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=1, metavar="N")
    return parser


def _override(text: str) -> tuple[str, object]:
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--set {text}: must be FIELD=VALUE, for example --set num_hidden_layers=2.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


# ---- tables


def _heading(model: nn.Module, source: str) -> str:
    return f"[bold]{type(model).__name__}[/bold] ({source})"


def _block_tables(blocks: list[MoEBlock], model: nn.Module) -> list[Table]:
    """One table for each kind of block; blocks that differ in their layer number alone share one."""
    tables = []
    for same in report.alike(blocks, model):
        first = same[0]
        table = Table(title=report.common_path([block.path for block in same]), title_justify="left", show_header=False)
        table.add_column(style="cyan")
        table.add_column(overflow="fold")
        for name, value in report.facts(first, model, len(same)):
            table.add_row(name, escape(value))
        tables.append(table)
    return tables


def _counts(model: nn.Module, blocks: list[MoEBlock]) -> Table:
    counts = report.count(model, blocks)
    table = Table("", "all of them", "active per token", title="Parameters", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("experts", f"{counts.experts:,}", f"{counts.experts_active:,}")
    table.add_row("the rest", f"{counts.dense:,}", f"{counts.dense:,}")
    everything, active = counts.experts + counts.dense, counts.experts_active + counts.dense
    table.add_row("all", f"{everything:,}", f"{active:,}", style="bold")
    return table


def _sharding(model: nn.Module, blocks: list[MoEBlock], sizes: MeshSizes, plan: Plan) -> Table:
    title = f"Placement on {sizes.world} rank{'s' if sizes.world > 1 else ''} ({report.shown(sizes)})"
    table = Table("parameters", "shape", "placement", "on each rank", title=title, title_justify="left")
    table.columns[0].overflow = "fold"
    for row in report.placements(model, blocks, sizes, plan):
        table.add_row(*map(escape, row))
    return table


def _memory(model: nn.Module, blocks: list[MoEBlock], sizes: MeshSizes, plan: Plan) -> Table:
    title = "Memory of a rank, without activations"
    table = Table("", "weights", "gradients", "Adam", "sum", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, numbers in report.memory(model, blocks, sizes, plan):
        table.add_row(name, *(report.gib(number) for number in numbers), style="bold" if name == "all" else "")
    return table


def _suggested(suggestions: list[Suggestion], arguments: argparse.Namespace) -> Table:
    title = (
        f"Meshes of {arguments.world} ranks, {arguments.memory:g} GiB each, "
        f"{arguments.tokens:,} tokens a step: estimates (see moeweave/parallel/suggest.py)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_lines=True)
    # A line for each axis: the table fits a terminal of 80 columns.
    for name in ("mesh", "sent by a rank"):
        table.add_column(name, no_wrap=True)
    for name in ("micro-\nbatches", "memory", "states", "bubble", "step"):
        table.add_column(name, no_wrap=True, justify="right")
    for each in suggestions:
        table.add_row(
            report.shown(each.sizes).replace(", ", "\n") + "\nrecompute" * each.plan.recompute,
            "\n".join(f"{axis} {report.gib(count)}" for axis, count in each.sent.items()),
            str(each.microbatches),
            report.gib(each.memory),
            report.gib(each.states),
            f"{each.bubble:.0%}",
            f"{each.seconds * 1e3:,.0f} ms",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
