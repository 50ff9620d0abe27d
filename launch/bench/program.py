"""The program: reads the config, starts ranks or uses those it finds, and prints what they measured."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

import moeweave as mw
from moeweave.launch import cli, elastic, env, runlog
from moeweave.launch.bench import ablation, collectives, overlap, raw, report, routed, shapes, topology
from moeweave.launch.bench.case import Case
from moeweave.launch.bench.measure import measure
from moeweave.launch.schema import BenchConfig, ConfigError, at_least

# op: the module with its `check` and `cases`.
OPS: dict[str, ModuleType] = {
    **dict.fromkeys(collectives.FACTORS, collectives),
    "raw": raw,
    **dict.fromkeys(routed.OPS, routed),
    "overlap": overlap,
    "topology": topology,
}
Line = dict[str, Any]
# What only some operations read: the field, and which.
READ_BY = {
    "shape": (*routed.OPS, "raw", "overlap"),
    "routing": (*routed.OPS, "raw"),
    "codec": routed.OPS,
    "num_sms": routed.OPS,
    "programs": ("raw", "overlap"),
    "ablate": ("moe_layer",),
}
PEAK_BYTES = 256 << 20  # an array that saturates the links of an accelerator

PROGRAM = cli.Program(
    name="moeweave-bench",
    config="bench",
    summary=(
        "Times collectives and MoE operations between ranks, each checked against known results first. The columns\n"
        "are those of nccl-tests; the exit code is 1 where a result was wrong.\n"
        "`moeweave-bench compare old.jsonl new.jsonl --threshold 0.1` compares two runs, and exits 1 on a slower one.\n"
        "`python -m moeweave.launch.bench.nccl_tests FOLDER ranks=2` runs beside the binaries of nccl-tests."
    ),
    examples=(
        ("moeweave-bench", "all_reduce from 1 KiB to 4 MiB on two ranks of this machine"),
        ("moeweave-bench op='[all_gather,all_to_all]' ranks=4 device=cpu max_size=16777216", "two collectives"),
        (
            "moeweave-bench op=all_to_all average=true kernel_times=true",
            "back to back, and the profiler's time of kernels",
        ),
        ("moeweave-bench op=dispatch backend='[alltoall,allgather]' shape=v3-decode128", "dispatchers side by side"),
        ("moeweave-bench op='[dispatch,combine,moe_layer]' routing=zipf tokens=1000 out=runs/bench", "with files"),
        ("moeweave-bench op=moe_layer ablate=true out=runs/bench", "what each part of the three-stream schedule gives"),
        ("moeweave-bench op=overlap overlap='[all_to_all,all_gather]' max_size=1048576", "what runs beside what"),
        ("moeweave-bench op=topology topology=runs/topology.json", "what dispatcher=auto reads as plan.topology"),
        ("torchrun --nproc-per-node 4 -m moeweave.launch.bench op=pairs max_size=1073741824", "under torchrun"),
    ),
    schema=BenchConfig,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 wrong results or a slower line, 2 the arguments cannot run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    return cli.run(PROGRAM, cli.starting(PROGRAM, _start), arguments)


def _start(config: BenchConfig) -> int:
    """What the user typed: refuses what would be without effect."""
    check_ops(config, config.ranks if (ranks := env.launched_ranks()) is None else ranks.world)
    usual = BenchConfig()
    for name, ops in READ_BY.items():
        value = getattr(config, name)
        if value != getattr(usual, name) and not set(ops) & set(config.ops):
            raise ConfigError(
                f"{name}={value}: op={config.op} does not read it. Leave it out, or use {', '.join(ops)}."
            )
    return start(config)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"compare: {message}. Write moeweave-bench compare old.jsonl new.jsonl --threshold 0.1.")


def _compare(arguments: list[str]) -> int:
    parser = _Parser(prog="moeweave-bench compare", description="Compares two bench.jsonl files.")
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=0.1, help="how much slower is too slow, 0.1 is 10 %%")
    try:
        args = parser.parse_args(arguments)
        at_least(0, threshold=args.threshold)
        text, bad = report.compare(args.old, args.new, args.threshold)
    except ConfigError as error:
        print(f"moeweave-bench: error: {error}", file=sys.stderr)
        return 2
    print(text)
    return int(bad > 0)


def start(*configs: BenchConfig) -> int:
    """Runs configs of as many ranks each, one after the other on the same ranks; returns the exit code."""
    return int(any(line["wrong"] for line in measured(*configs)))


def measured(*configs: BenchConfig) -> list[Line]:
    """The lines of all configs, run and printed as `start` does, on ranks of its own; those of a launcher end here."""
    first, ranks = configs[0], env.launched_ranks()
    world = first.ranks if ranks is None else ranks.world
    for config in configs:
        check(config, world, own_ranks=ranks is None)
    env.quiet_profiler()
    if ranks is not None:
        elastic.leave(int(any(line["wrong"] for line in rank_main(configs, world))))
    on_cpu = first.device == "cpu" or not elastic.has_accelerator()
    with elastic.passing_logs("moeweave-bench-") as logs:
        lines: list[Line] = elastic.start_ranks(rank_main, configs, world, num_ranks=world, log_dir=logs, on_cpu=on_cpu)
    return lines


def check(config: BenchConfig, world: int, *, own_ranks: bool = True) -> None:
    """Raise ConfigError for what cannot run, before any rank starts; `own_ranks`: all on this machine."""
    if world < 2:
        raise ConfigError(f"ranks={world}: communication needs at least 2 ranks. Set ranks=2 or more.")
    elastic.check_device("device", config.device, world if own_ranks else 1)
    on_cpu = config.device == "cpu" or not elastic.has_accelerator()
    if config.graph and (on_cpu or not torch.version.cuda):
        raise ConfigError("graph=true: CUDA graphs need a CUDA device. Set graph=false.")
    found = torch.accelerator.current_accelerator(check_available=True)
    if config.kernel_times and not on_cpu and found is not None and found.type != "cuda":
        raise ConfigError(f"kernel_times=true: reads the kernels of CUDA devices, not {found.type}. Leave it out.")
    files = {
        "out": config.out,
        "trace": config.trace,
        "topology": config.topology if "topology" in config.ops else None,
    }
    for name, path in files.items():
        if path is not None:
            _check_writable(name, Path(path))
    if config.average and "overlap" in config.ops:
        raise ConfigError("average=true: op=overlap times each iteration's sides. Set average=false.")
    check_ops(config, world)


def _check_writable(name: str, path: Path) -> None:
    """Raise ConfigError where nothing can be written at `path`, before what goes there has been measured."""
    there = next(each for each in (path, *path.parents) if each.exists())
    if not os.access(there, os.W_OK) or not (there.is_dir() or (there == path and name == "topology")):
        raise ConfigError(f"{name}={path}: {there} cannot hold it. Name a place that can be written.")


def check_ops(config: BenchConfig, world: int) -> None:
    """Raise ConfigError for operations and backends that there are not, or that so many ranks cannot run."""
    for op in config.ops:
        if op not in OPS:
            raise ConfigError(f"op={op}: must be one of {', '.join(OPS)}.")
        OPS[op].check(op, config, world)


def rank_main(configs: Sequence[BenchConfig], world: int) -> list[Line]:
    """One rank's life; all lines. Rank 0 tells and writes each config's figures when it has them."""
    found: list[Line] = []
    for config in configs:
        lines = bench(config, world)
        found += lines
        if dist.get_rank() == 0:
            _tell(lines, config)
    dist.barrier()
    dist.destroy_process_group()
    return found


def _tell(lines: list[Line], config: BenchConfig) -> None:
    print(report.table(lines, lines[0]["context"]))
    if "topology" in config.ops:
        told = "written" if lines[0]["topology"] else "not written, a result was wrong"
        print(f"{told}: {config.topology}")
    if config.out is not None:
        report.write(lines, Path(config.out))
        print(f"written: {config.out}/bench.jsonl, bench.csv, bench.png", flush=True)


def bench(config: BenchConfig, world: int) -> list[Line]:
    """One rank's part: every case in turn. Returns the lines, the same on every rank."""
    mesh = mw.Mesh(dp=world, ep=world, device=config.device)
    lines, quiet = [], mesh.rank > 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("moeweave-bench", total=None)
        for case in _cases(config, mesh):
            progress.update(task, description=case.name)
            lines.append(measure(case, config, mesh))
            progress.advance(task)
    about = _context(config, mesh)
    for line in lines:
        line |= {"flush": config.flush and not config.average, "routing": config.routing, "device": mesh.device.type}
        line |= {"context": about} | ({"average": True} if config.average else {})
    report.relate(lines)
    overlap.relate(lines)
    ablation.relate(lines)
    if "topology" in config.ops:
        _write_topology(lines, config, mesh)
    return lines


def _cases(config: BenchConfig, mesh: mw.Mesh) -> Iterator[Case]:
    if any(op in routed.OPS for op in config.ops):
        yield from _peaks(config, mesh)
    for op in config.ops:
        yield from OPS[op].cases(op, config, mesh)
        if op == "moe_layer" and config.ablate:
            yield from ablation.cases(config, mesh)


def _peaks(config: BenchConfig, mesh: mw.Mesh) -> Iterator[Case]:
    """What the links give in this run: an all-to-all of equal blocks and, where memory can be written across, the
    bytes that a dispatch of this shape must send, written without a collective.
    """
    shape = shapes.shape_of(config)
    item = getattr(torch, config.dtype).itemsize
    most = 1 << 20 if mesh.device.type == "cpu" else PEAK_BYTES
    size = max(shape.tokens * shape.hidden * item, most) // (item * mesh.world) * item * mesh.world
    plain = dataclasses.replace(config, min_size=size, max_size=size, backend="torch")
    for case in collectives.cases("all_to_all", plain, mesh):
        yield dataclasses.replace(case, op="peak", label="equal blocks")
    if mesh.device.type in ("cuda", "cpu") and topology.is_one_memory(mesh):
        crossing = max(16, shapes.crossing_bytes(config, mesh.world))
        for case in raw.cases("raw", dataclasses.replace(config, backend=list(raw.PLANES)), mesh, crossing):
            yield dataclasses.replace(case, op="peak", label="raw")


def _write_topology(lines: list[Line], config: BenchConfig, mesh: mw.Mesh) -> None:
    found = topology.topology(lines, mesh, config)
    lines[0]["topology"] = None if found is None else topology.table(found)
    if found is not None and mesh.rank == 0:
        found.save(config.topology)


def _context(config: BenchConfig, mesh: mw.Mesh) -> dict[str, Any]:
    cuda = mesh.device.type == "cuda"
    versions = runlog.versions()
    if cuda:
        versions |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return {
        "config": dataclasses.asdict(config),
        "ranks": mesh.world,
        "device_name": topology.device_name(mesh.device),
        "versions": versions,
        "git": runlog.git_state(Path(__file__).parent),
    }
