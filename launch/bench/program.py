"""The program: reads the config, starts ranks or uses those it finds, and prints what they measured."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track

import moeweave as mw
from moeweave.launch import cli, compose, elastic, env, runlog
from moeweave.launch.bench import collectives, report, routed
from moeweave.launch.bench.case import Case
from moeweave.launch.bench.measure import measure
from moeweave.launch.schema import BenchConfig, ConfigError

OPS = (*collectives.FACTORS, *routed.OPS)
PROGRAM = cli.Program(
    name="moeweave-bench",
    config="bench",
    summary=(
        "Times collectives and MoE operations between ranks, each checked against known results first. The columns\n"
        "are those of nccl-tests; the exit code is 1 where a result was wrong.\n"
        "`moeweave-bench compare old.jsonl new.jsonl --threshold 0.1` compares two runs, and exits 1 on a slower line."
    ),
    examples=(
        ("moeweave-bench", "all_reduce from 1 KiB to 4 MiB on two ranks of this machine"),
        ("moeweave-bench op='[all_gather,all_to_all]' ranks=4 device=cpu max_size=16777216", "two collectives"),
        ("moeweave-bench op=dispatch backend='[alltoall,allgather]' shape=v3-decode128", "dispatchers side by side"),
        ("moeweave-bench op='[dispatch,combine,moe_layer]' routing=zipf tokens=1000 out=runs/bench", "with files"),
        ("torchrun --nproc-per-node 4 -m moeweave.launch.bench op=pairs max_size=1073741824", "under torchrun"),
    ),
    schema=BenchConfig,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 wrong results or a slower line, 2 the arguments cannot run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    return cli.run(PROGRAM, _body, arguments)


def _compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="moeweave-bench compare", description="Compares two bench.jsonl files.")
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=0.1, help="how much slower is too slow, 0.1 is 10 %%")
    args = parser.parse_args(arguments)
    try:
        text, bad = report.compare(args.old, args.new, args.threshold)
    except ConfigError as error:
        print(f"moeweave-bench: error: {error}", file=sys.stderr)
        return 2
    print(text)
    return int(bad > 0)


def _body(arguments: cli.Arguments) -> int:
    config = compose.load(BenchConfig, "bench", arguments.overrides, arguments.config_dir)
    if arguments.show_config:
        print(compose.to_yaml(config), end="")
        return 0
    ranks = env.launched_ranks()
    world = config.ranks if ranks is None else ranks.world
    check(config, world)
    on_cpu = config.device == "cpu" or not elastic.has_accelerator()
    if ranks is not None:
        lines = rank_main(config, world)
    else:
        logs = Path(tempfile.mkdtemp(prefix="moeweave-bench-"))
        lines = elastic.start_ranks(rank_main, config, world, num_ranks=world, log_dir=logs, on_cpu=on_cpu)
        shutil.rmtree(logs)  # stays where a rank failed: the error names a file in it
    if ranks is None or ranks.rank == 0:
        print(report.table(lines, lines[0]["context"]))
        if config.out is not None:
            report.write(lines, Path(config.out))
            print(f"written: {config.out}/bench.jsonl, bench.csv, bench.png")
    return int(any(line["wrong"] for line in lines))


def check(config: BenchConfig, world: int) -> None:
    """Raise ConfigError for what cannot run, before any rank starts."""
    if world < 2:
        raise ConfigError(f"ranks={world}: communication needs at least 2 ranks. Set ranks=2 or more.")
    if config.device != "cpu" and torch.accelerator.is_available() and world > torch.accelerator.device_count():
        found = torch.accelerator.device_count()
        raise ConfigError(f"ranks={world}: this machine has {found} devices. Set ranks={found}, or device=cpu.")
    for op in config.ops:
        if op not in OPS:
            raise ConfigError(f"op={op}: must be one of {', '.join(OPS)}.")
        (routed if op in routed.OPS else collectives).check(op, config, world)


def rank_main(config: BenchConfig, world: int) -> list[dict[str, Any]]:
    """One rank's life."""
    lines = bench(config, world)
    dist.barrier()
    dist.destroy_process_group()
    return lines


def bench(config: BenchConfig, world: int) -> list[dict[str, Any]]:
    """One rank's part: every case in turn. Returns the lines, the same on every rank."""
    mesh = mw.Mesh(dp=world, ep=world, device=config.device)
    todo = list(_cases(config, mesh))
    shown = track(todo, "moeweave-bench", transient=True) if mesh.rank == 0 and sys.stderr.isatty() else todo
    lines = [measure(case, config, mesh) for case in shown]
    about = _context(config, mesh)
    for line in lines:
        line |= {
            "graph": config.graph,
            "flush": config.flush,
            "routing": config.routing,
            "device": mesh.device.type,
            "context": about,
        }
    report.relate(lines)
    return lines


def _cases(config: BenchConfig, mesh: mw.Mesh) -> Iterator[Case]:
    if any(op in routed.OPS for op in config.ops):
        yield _peak(config, mesh)
    yield from chain.from_iterable(
        (routed if op in routed.OPS else collectives).cases(op, config, mesh) for op in config.ops
    )


def _peak(config: BenchConfig, mesh: mw.Mesh) -> Case:
    """An all-to-all of equal blocks, of the size that a dispatch sends: what the links give in this run."""
    shape = routed.shape_of(config)
    item = getattr(torch, config.dtype).itemsize
    size = max(shape.tokens * shape.hidden * item, 1 << 20) // (item * mesh.world) * item * mesh.world
    plain = dataclasses.replace(config, min_size=size, max_size=size, backend="torch")
    (case,) = collectives.cases("all_to_all", plain, mesh)
    return dataclasses.replace(case, op="peak", label="equal blocks")


def _context(config: BenchConfig, mesh: mw.Mesh) -> dict[str, Any]:
    cuda = mesh.device.type == "cuda"
    return {
        "config": dataclasses.asdict(config),
        "ranks": mesh.world,
        "device_name": torch.cuda.get_device_name() if cuda else runlog.processor(),
        "versions": runlog.versions() | ({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if cuda else {}),
        "git": runlog.git_state(Path(__file__).parent),
    }
