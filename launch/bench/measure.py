"""How a case is timed: checked, warmed up, then one iteration at a time, or with `average=true` back to back.

The slowest rank's time counts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import record_function

from moeweave.launch.bench import kernels
from moeweave.launch.bench.case import Case
from moeweave.launch.schema import BenchConfig
from moeweave.parallel.mesh import Mesh

L2_BYTES = 256 << 20  # more than any accelerator's second-level cache
HELD = 300.0, 3000.0  # microseconds that a device is held, the least and the most
LAUNCHES = 5
ROUNDS = 5  # that `average=true` times, each of all iterations
TRACED = 3


@dataclass(frozen=True)
class Times:
    """Microseconds of every iteration, of the slowest rank; of iterations back to back, their mean in each round.

    Attributes:
        device: from the moment that all ranks were ready to the end of the work on the device. CUDA devices are held
            for as long as launching takes before that moment, as they are in a program that keeps them busy: what is
            launched meanwhile costs nothing, and ranks start within a few microseconds of each other.
        host: until the call returned, with nothing else on the device.
        sides: of each thing that ran, where several did at once.
    """

    device: np.ndarray
    host: np.ndarray
    sides: dict[str, np.ndarray]


def measure(case: Case, config: BenchConfig, mesh: Mesh) -> dict[str, Any]:
    """One line of figures, equal on every rank; times in microseconds. Nothing is timed where `wrong` is not 0."""
    with record_function(f"check: {case.name}"):
        wrong = _wrong(case, mesh)
    graph = config.graph and case.graph
    line: dict[str, Any] = dict(
        op=case.op,
        backend=case.backend,
        label=case.label,
        size=case.size,
        count=case.count,
        dtype=case.dtype,
        redop=case.redop,
        in_place=case.in_place,
        factor=case.factor,
        ranks=mesh.world,
        graph=graph,
        wrong=wrong,
        logical_bytes=_total(case.logical_bytes, mesh),
        wire_bytes=_total(case.wire_bytes, mesh),
        network_bytes=_total(case.network_bytes, mesh),
    )
    if wrong:
        return line
    run = _graph(case.work.run) if graph else case.work.run
    with record_function(f"warm-up: {case.name}"):
        for _ in range(config.warmup):
            run()
        _synchronize(mesh)
        hold = _hold_for(run, mesh)
    with record_function(f"time: {case.name}"):
        times = _back_to_back(run, config, mesh) if config.average else _times(case, run, hold, config, mesh)
    if config.trace is not None:
        _trace(case, run, hold, config, mesh)
    line |= figures(times, case, line["logical_bytes"], mesh.world)
    if config.kernel_times:
        line |= _kernel_times(case, run, config, mesh)
    return line if case.facts is None else line | case.facts()


def figures(times: Times, case: Case, logical: int | None, ranks: int) -> dict[str, Any]:
    """Statistics of the slowest rank's times, and bandwidths from their median (1 GB/s is 1000 bytes a microsecond).

    algbw is size over time; busbw is algbw times the operation's factor. For MoE operations busbw is the logical bytes
    of an average rank over the time.
    """
    median = float(np.median(times.device))
    percentiles = {f"p{p}": float(np.percentile(times.device, p)) for p in (95, 99)}
    algbw = case.size / median / 1e3
    busbw = algbw * case.factor if logical is None else logical / ranks / median / 1e3
    sides = {name: float(np.median(each)) for name, each in times.sides.items()}
    return dict(
        median=median,
        min=float(times.device.min()),
        mean=float(times.device.mean()),
        **percentiles,
        host=float(np.median(times.host)),
        algbw=algbw,
        busbw=busbw,
        times=[round(float(each), 3) for each in times.device],
        **({"sides": sides} if sides else {}),
    )


def _wrong(case: Case, mesh: Mesh) -> int:
    """Elements of all ranks' results that are not as they must be, after a run over overwritten memory."""
    case.work.reset()
    _synchronize(mesh)  # a peer that writes into this rank's memory must not do so before it was overwritten
    case.work.run()
    _synchronize(mesh)
    off = case.work.off()
    return int(_over_ranks(torch.tensor([off], dtype=torch.float64), dist.ReduceOp.SUM, mesh)[0])


@dataclass(frozen=True)
class _Hold:
    """What keeps a device busy while the host launches, and how long launching took without it."""

    hold: Callable[[], None]
    hosts: list[float]


def _hold_for(run: Callable[[], object], mesh: Mesh) -> _Hold | None:
    """Holds a CUDA device for twice the time that the slowest rank's host needs to launch `run`, as nvbench does.

    Bounded: work that waits for the device waits for this as well, though before anything is timed.
    """
    if mesh.device.type != "cuda":
        return None
    hosts = [_once_on_device(run)[1] for _ in range(LAUNCHES)]
    cycles = 1_000_000
    rate = cycles / min(_once_on_device(lambda: torch.cuda._sleep(cycles))[0] for _ in range(LAUNCHES))
    host = float(_over_ranks(torch.tensor([np.median(hosts)]), dist.ReduceOp.MAX, mesh)[0])
    held = int(rate * min(HELD[0] + 2 * host, HELD[1]))
    return _Hold(lambda: torch.cuda._sleep(held), hosts)


def _times(case: Case, run: Callable[[], object], hold: _Hold | None, config: BenchConfig, mesh: Mesh) -> Times:
    on_cpu = mesh.device.type == "cpu"
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=mesh.device) if config.flush and not on_cpu else None
    found: list[tuple[float, ...]] = []
    names: list[str] = []
    for _ in range(config.iterations):
        with record_function("flush and barrier"):
            if flush is not None:
                flush.zero_()
            if hold is not None:
                hold.hold()
            _barrier(mesh)
        device, host = (_once_on_cpu if on_cpu else _once_on_device)(run)
        sides = {} if case.sides is None else case.sides()
        names = list(sides)
        found.append((device, host, *sides.values()))
    slowest = _over_ranks(torch.tensor(found, dtype=torch.float64), dist.ReduceOp.MAX, mesh).numpy()
    hosts = slowest[:, 1]
    if hold is not None:  # what waits for the device has waited for the hold here
        hosts = _over_ranks(torch.tensor(hold.hosts, dtype=torch.float64), dist.ReduceOp.MAX, mesh).numpy()
    return Times(slowest[:, 0], hosts, {name: slowest[:, 2 + at] for at, name in enumerate(names)})


def _back_to_back(run: Callable[[], object], config: BenchConfig, mesh: Mesh) -> Times:
    """Iterations launched one after the other, timed together until the device is done: what nccl-tests report.

    No barrier, flush or hold comes between them. So hosts launch while devices work, the next iteration may begin on
    one rank while the last ends on another, and each finds the caches as the one before left them.
    """
    found = []
    for _ in range(ROUNDS):
        _synchronize(mesh)
        _wait(mesh)  # on a device the barrier of the line above is queued
        start = time.perf_counter_ns()
        for _ in range(config.iterations):
            run()
        launched = time.perf_counter_ns()
        _wait(mesh)
        found.append((time.perf_counter_ns() - start, launched - start))
    mean = torch.tensor(found, dtype=torch.float64) / 1e3 / config.iterations
    slowest = _over_ranks(mean, dist.ReduceOp.MAX, mesh).numpy()
    return Times(slowest[:, 0], slowest[:, 1], {})


def _kernel_times(case: Case, run: Callable[[], object], config: BenchConfig, mesh: Mesh) -> dict[str, float | None]:
    """`kernel` and `kernel_least`, medians in microseconds of iterations timed once more under the profiler.

    Hosts launch more slowly there, so how long devices are held is found anew; that run also starts the profiler up.
    """
    with torch.profiler.profile():
        hold = _hold_for(run, mesh)
    with torch.profiler.profile() as profile:
        _times(case, run, hold, config, mesh)
    events: Any = profile.profiler.kineto_results.events()
    mine = torch.tensor(kernels.times(events, mesh.device.type), dtype=torch.float64)
    slowest = _over_ranks(mine, dist.ReduceOp.MAX, mesh)
    least = _over_ranks(mine.masked_fill(mine == 0, torch.inf), dist.ReduceOp.MIN, mesh)
    if not slowest.all():
        return {"kernel": None, "kernel_least": None}
    return {"kernel": float(slowest.median()), "kernel_least": float(least.median())}


def _once_on_cpu(run: Callable[[], object]) -> tuple[float, float]:
    start = time.perf_counter_ns()
    with record_function(kernels.RUN):
        run()
    elapsed = (time.perf_counter_ns() - start) / 1e3
    return elapsed, elapsed


def _once_on_device(run: Callable[[], object]) -> tuple[float, float]:
    before, after = (torch.Event(enable_timing=True) for _ in range(2))
    before.record()
    start = time.perf_counter_ns()
    with record_function(kernels.RUN):
        run()
    host = (time.perf_counter_ns() - start) / 1e3
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e3, host


def _graph(run: Callable[[], object]) -> Callable[[], object]:
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


def _trace(case: Case, run: Callable[[], object], hold: _Hold | None, config: BenchConfig, mesh: Mesh) -> None:
    """<trace>/rank<r>/<case>.json: a Chrome trace of a few more iterations, whose times do not count."""
    path = Path(config.trace or "") / f"rank{mesh.rank}" / (re.sub(r"[^\w.-]+", "_", case.name) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        with record_function(f"time: {case.name}"):
            _times(case, run, hold, replace(config, iterations=TRACED), mesh)
        with record_function(f"check: {case.name}"):
            case.work.off()
    profile.export_chrome_trace(str(path))


def _barrier(mesh: Mesh) -> None:
    """Ranks start together: on the CPU by a barrier, on a device by a small all-reduce in its queue."""
    if mesh.device.type == "cpu":
        dist.barrier(mesh.data_group)
    else:
        dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.data_group)


def _synchronize(mesh: Mesh) -> None:
    _wait(mesh)
    _barrier(mesh)


def _wait(mesh: Mesh) -> None:
    """Until this rank's device has done what was launched."""
    if mesh.device.type != "cpu":
        torch.accelerator.synchronize()


def _over_ranks(values: torch.Tensor, op: Any, mesh: Mesh) -> torch.Tensor:
    there = values.to(mesh.device)
    dist.all_reduce(there, op=op, group=mesh.data_group)
    return there.cpu()


def _total(value: int | None, mesh: Mesh) -> int | None:
    total = _over_ranks(torch.tensor([value or 0, value is None], dtype=torch.float64), dist.ReduceOp.SUM, mesh)
    return None if total[1] else int(total[0])
