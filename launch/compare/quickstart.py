"""`python -m moeweave.launch.compare ep|ep1`: training speed of the quickstart model beside others, in one run.

    ep    2 ranks: moeweave EP2 + FSDP2 against transformers' own EP2 + FSDP2 (all-to-all)
    ep1   1 rank: the wrapped model against the same model unwrapped

All methods start from the same weights and see the same batches; each round times one training step of each (forward,
backward, AdamW), in an order drawn anew. A second copy of moeweave runs along: its ratio to the first (A/A) is what
noise alone gives. Before anything is timed, every method's loss is checked against the unwrapped model's.

A ratio is the geometric mean over rounds of moeweave's tokens/s over the other's, with a bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import moeweave as mw
from moeweave.kernels_ext.tolerance import TOLERANCE
from moeweave.launch import data, runlog
from moeweave.launch.compare.files import file_to_write
from moeweave.launch.compare.on_ranks import timed
from moeweave.launch.compose import load
from moeweave.launch.elastic import start_ranks
from moeweave.launch.prepare import model_builder
from moeweave.launch.sampler import Sampler
from moeweave.launch.schema import TrainConfig
from moeweave.parallel.hf.rival import transformers_expert_parallel, why_not

OURS, CONTROL = "moeweave", "moeweave again (A/A)"
RANKS = {"ep": 2, "ep1": 1}
Batch = dict[str, torch.Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    console = Console()
    reason = why_not() if args.what == "ep" else None
    if reason is not None:
        console.print(f"compare ep: {reason}. Install transformers >= 5.23.")
        return 2
    overrides = ["experiment=quickstart", f"mesh.dp={RANKS[args.what]}", f"mesh.ep={RANKS[args.what]}"]
    config = load(TrainConfig, "train", [*overrides, f"batch_size={8 * RANKS[args.what]}"])
    with tempfile.TemporaryDirectory() as folder:
        seconds = start_ranks(
            _measure, config, args.what, args.rounds, folder, num_ranks=RANKS[args.what], log_dir=Path(folder, "logs")
        )
    result = summarise(seconds, config.batch_size * config.data.seq_length)
    result |= {"what": args.what, "rounds": args.rounds, "config": asdict(config), **runlog.provenance()}
    console.print(_table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written: {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moeweave.launch.compare",
        description="Training speed on the quickstart model beside transformers' own EP, or the unwrapped model.",
        epilog="python -m moeweave.launch.compare ep --rounds 40 --out ep.json; whole models: compare models --help",
    )
    parser.add_argument("what", choices=RANKS, help="ep: against transformers' EP, 2 ranks; ep1: unwrapped, 1 rank")
    parser.add_argument("--rounds", type=int, default=40, help="interleaved rounds; at least 20")
    parser.add_argument("--out", type=file_to_write, help="write all figures here as JSON")
    return parser


# ---- on each rank


def _measure(config: TrainConfig, what: str, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of each round's step, by method, the slowest rank's."""
    torch.distributed.init_process_group("gloo")
    mesh = mw.Mesh(dp=RANKS[what], ep=RANKS[what], device="cpu")
    build = model_builder(config.model, config.seed)
    tokens = data.open_tokens(config.data)
    sampler = Sampler(tokens, config.data.seq_length, config.batch_size, config.seed, mesh.rank, mesh.world, None)
    steps: dict[str, Callable[[Batch], float]] = {}
    for name, model in _methods(what, build, mesh, Path(folder)).items():
        model.train()
        groups: Any = mw.param_groups(model)
        steps[name] = _step(model, torch.optim.AdamW(groups, lr=1e-4, foreach=False))
    _check(steps, build, sampler)
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in track(range(rounds + 3), description=f"compare {what}", disable=mesh.rank > 0):
        batch = sampler.batch(index * config.batch_size)
        for choice in order.permutation(len(names)):
            elapsed = timed(functools.partial(steps[names[choice]], batch), mesh.device)
            if index >= 3:  # the first rounds warm caches, allocators and FSDP's lazy set-up
                seconds[names[choice]].append(elapsed)
    dist.destroy_process_group()
    return seconds


def _methods(what: str, build: Callable[[], nn.Module], mesh: mw.Mesh, folder: Path) -> dict[str, nn.Module]:
    ours = {name: mw.parallelize(build(), mesh, mw.Plan(aux="rank")) for name in (OURS, CONTROL)}
    if what == "ep1":
        return {**ours, "unwrapped": build()}
    if mesh.rank == 0:
        build().save_pretrained(folder / "model")  # type: ignore[operator]
    dist.barrier()
    return {**ours, "transformers EP": transformers_expert_parallel(folder / "model", ep=2, fsdp=2)}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Batch], float]:
    def step(batch: Batch) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _check(steps: dict[str, Callable[[Batch], float]], build: Callable[[], nn.Module], sampler: Sampler) -> None:
    """One step of every method; its loss must be the unwrapped model's on this rank's batch."""
    batch = sampler.batch(0)
    with torch.no_grad():
        want = float(build().train()(**batch).loss)
    for name, step in steps.items():
        got = step(batch)
        if abs(got - want) > TOLERANCE[torch.float32] * abs(want):
            raise RuntimeError(f"{name}: loss {got} differs from the unwrapped model's {want}; nothing was timed.")


# ---- figures


def summarise(seconds: dict[str, list[float]], tokens: int, seed: int = 0) -> dict[str, Any]:
    """Seconds by method and round -> median tokens/s of each, and the ratio of moeweave to each other one."""
    rng = np.random.default_rng(seed)
    ours = np.array(seconds[OURS])
    ratios = {}
    for name, times in seconds.items():
        if name == OURS:
            continue
        logs = np.log(np.array(times) / ours)
        means = rng.choice(logs, size=(10_000, len(logs))).mean(1)
        low, high = np.exp(np.quantile(means, [0.025, 0.975]))
        ratios[name] = {"ratio": float(np.exp(logs.mean())), "low": float(low), "high": float(high)}
    speeds = {name: tokens / float(np.median(times)) for name, times in seconds.items()}
    return {"tokens_per_second": speeds, "ratios": ratios, "seconds": seconds}


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"compare {result['what']}: {result['rounds']} interleaved rounds")
    for column in ("method", "tokens/s (median)", "moeweave / method", "95 % interval"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, speed in result["tokens_per_second"].items():
        ratio = result["ratios"].get(name)
        shown = (f"{ratio['ratio']:.3f}", f"{ratio['low']:.3f} - {ratio['high']:.3f}") if ratio else ("", "")
        table.add_row(name, f"{speed:,.0f}", *shown)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
