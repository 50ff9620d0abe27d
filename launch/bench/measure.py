"""How a case is timed: checked, warmed up, then one iteration at a time; the slowest rank's time counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import record_function

from moeweave.launch.bench.case import Case
from moeweave.launch.schema import BenchConfig
from moeweave.parallel.mesh import Mesh

L2_BYTES = 256 << 20  # more than any accelerator's second-level cache
TRACED = 3


def measure(case: Case, config: BenchConfig, mesh: Mesh) -> dict[str, Any]:
    """One line of figures, equal on every rank; times in microseconds. Nothing is timed where `wrong` is not 0."""
    name = f"{case.op} {case.backend} {case.label or case.size}"
    with record_function(f"check: {name}"):
        wrong = int(_over_ranks(torch.tensor([case.wrong()], dtype=torch.float64), dist.ReduceOp.SUM, mesh)[0])
    line: dict[str, Any] = dict(
        op=case.op,
        backend=case.backend,
        label=case.label,
        size=case.size,
        count=case.count,
        dtype=case.dtype,
        redop=case.redop,
        in_place=case.in_place,
        ranks=mesh.world,
        wrong=wrong,
        logical_bytes=_total(case.logical_bytes, mesh),
        wire_bytes=_total(case.wire_bytes, mesh),
    )
    if wrong:
        return line
    run = _graph(case.run, mesh) if config.graph else case.run
    with record_function(f"warm-up: {name}"):
        for _ in range(config.warmup):
            run()
        _synchronize(mesh)
    with record_function(f"time: {name}"):
        device_us, host_us = _times(run, config, mesh)
    if config.trace is not None:
        _trace(run, Path(config.trace), mesh)
    return line | figures(device_us, host_us, case, line["logical_bytes"], mesh.world)


def figures(device_us: np.ndarray, host_us: np.ndarray, case: Case, logical: int | None, ranks: int) -> dict[str, Any]:
    """Statistics of the slowest rank's times, and bandwidths from their median (1 GB/s is 1000 bytes a microsecond).

    algbw is size over time; busbw is algbw times the operation's factor. For MoE operations busbw is the logical bytes
    of an average rank over the time.
    """
    median = float(np.median(device_us))
    percentiles = {f"p{p}": float(np.percentile(device_us, p)) for p in (95, 99)}
    algbw = case.size / median / 1e3
    busbw = algbw * case.factor if logical is None else logical / ranks / median / 1e3
    return dict(
        median=median,
        min=float(device_us.min()),
        **percentiles,
        host=float(np.median(host_us)),
        algbw=algbw,
        busbw=busbw,
        times=[round(float(each), 3) for each in device_us],
    )


def _times(run: Callable[[], object], config: BenchConfig, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds of each iteration, of the slowest rank: on the device, and until the call returned."""
    on_cpu = mesh.device.type == "cpu"
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=mesh.device) if config.flush and not on_cpu else None
    device, host = [], []
    for _ in range(config.iterations):
        if flush is not None:
            flush.zero_()
        _barrier(mesh)
        if on_cpu:
            start = time.perf_counter_ns()
            run()
            device.append((time.perf_counter_ns() - start) / 1e3)
            host.append(device[-1])
            continue
        before, after = (torch.Event(device=mesh.device, enable_timing=True) for _ in range(2))
        before.record()
        start = time.perf_counter_ns()
        run()
        host.append((time.perf_counter_ns() - start) / 1e3)
        after.record()
        after.synchronize()
        device.append(before.elapsed_time(after) * 1e3)
    both = _over_ranks(torch.tensor([device, host], dtype=torch.float64), dist.ReduceOp.MAX, mesh)
    return both[0].numpy(), both[1].numpy()


def _graph(run: Callable[[], object], mesh: Mesh) -> Callable[[], object]:
    if mesh.device.type != "cuda":
        raise ValueError(f"graph=true: needs a CUDA device, this is {mesh.device.type}. Set graph=false.")
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"graph=true: this operation cannot be captured ({reason}). Set graph=false.") from error
    return graph.replay


def _trace(run: Callable[[], object], folder: Path, mesh: Mesh) -> None:
    """One file a rank, the last case's."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        for _ in range(TRACED):
            run()
        _synchronize(mesh)
    profile.export_chrome_trace(str(folder / f"rank{mesh.rank}.json"))


def _barrier(mesh: Mesh) -> None:
    """Ranks start together: on the CPU by a barrier, on a device by a small all-reduce in its queue."""
    if mesh.device.type == "cpu":
        dist.barrier(mesh.data_group)
    else:
        dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.data_group)


def _synchronize(mesh: Mesh) -> None:
    if mesh.device.type != "cpu":
        torch.accelerator.synchronize()
    _barrier(mesh)


def _over_ranks(values: torch.Tensor, op: Any, mesh: Mesh) -> torch.Tensor:
    there = values.to(mesh.device)
    dist.all_reduce(there, op=op, group=mesh.data_group)
    return there.cpu()


def _total(value: int | None, mesh: Mesh) -> int | None:
    total = _over_ranks(torch.tensor([value or 0, value is None], dtype=torch.float64), dist.ReduceOp.SUM, mesh)
    return None if total[1] else int(total[0])
