"""`op=overlap`: two communications and a matrix product, alone and together in every pairing.

On CUDA and NPUs each side has a stream of its own, on the CPU a thread of its own (the product runs in the calling
thread). The communications have groups of their own, so that neither waits in the other's queue. The product is
repeated until it takes about as long as the slower communication alone. busbw is what crosses a rank's links in all
communications together over the time.

Legend: T tokens, D width, F width of an expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.launch.bench import collectives, raw, shapes
from moeweave.launch.bench.case import Case, Work, backend_factory
from moeweave.launch.schema import BenchConfig, ConfigError
from moeweave.parallel.mesh import Mesh

PRODUCT = "matmul"
COMMUNICATIONS = (*(op for op in collectives.FACTORS if op != "pairs"), *raw.PLANES)
MOST_PRODUCTS = 1000

Line = dict[str, Any]


def check(op: str, config: BenchConfig, ranks: int) -> None:
    """Raise ConfigError unless `overlap` names two communications whose size can be shared out."""
    shapes.shape_of(config)
    names = config.overlap
    if len(names) != 2 or not set(names) <= set(COMMUNICATIONS):
        raise ConfigError(
            f"overlap={names}: must be two of {', '.join(COMMUNICATIONS)}. Write overlap='[all_to_all,all_gather]'."
        )
    raw.check_planes(names, config)
    one_size = replace(config, min_size=config.max_size)
    for name in set(names) - set(raw.PLANES):
        collectives.check(name, one_size, ranks)


def cases(op: str, config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """Each side alone, each two of them, and all three."""
    groups = [mesh.group("ep"), dist.new_group()]
    for backend in config.backends or ["torch"]:
        sides = {}
        for name, group in zip(config.overlap, groups, strict=True):
            sides[name if name not in sides else f"{name} again"] = _communication(name, backend, config, mesh, group)
        works = {name: work for name, (work, _) in sides.items()}
        works[PRODUCT] = _product(config, mesh, max(_alone_us(work, mesh) for work in works.values()))
        crossing = {name: number for name, (_, number) in sides.items()}
        for number in (1, 2, 3):
            for names in combinations(works, number):
                yield _case(names, works, crossing, backend, config, mesh)


def _case(
    names: tuple[str, ...],
    works: dict[str, Work],
    crossing: dict[str, float],
    backend: str,
    config: BenchConfig,
    mesh: Mesh,
) -> Case:
    together = Together({name: works[name] for name in names}, mesh)
    communications = [name for name in names if name != PRODUCT]
    size = config.max_size * len(communications)
    factor = sum(crossing[name] for name in communications) / size if size else 1.0
    return Case(
        "overlap",
        backend,
        size,
        size // getattr(torch, config.dtype).itemsize,
        config.dtype,
        together.work(),
        factor,
        label=" + ".join(names),
        graph=False,
        sides=together.sides,
    )


def relate(lines: list[Line]) -> None:
    """Adds to each line of several sides what they cost each other, from the lines of each side alone.

    slowdown: each side's time over its time alone. exposed: microseconds beyond the product alone (without one: beyond
    the longer communication alone). concurrent: the share of what could be hidden that was: 0 where the sides took as
    long as one after the other, 1 where the shorter ones cost nothing, below 0 where together is worse.
    """
    found = [line for line in lines if line["op"] == "overlap" and "sides" in line]
    alone = {(line["backend"], line["label"]): line["median"] for line in found if len(line["sides"]) == 1}
    for line in found:
        times = {side: alone[line["backend"], side] for side in line["sides"] if (line["backend"], side) in alone}
        if len(times) < max(2, len(line["sides"])):
            continue
        longest, total = max(times.values()), sum(times.values())
        line["slowdown"] = {side: line["sides"][side] / times[side] for side in times}
        line["exposed"] = line["median"] - times.get(PRODUCT, longest)
        line["concurrent"] = (total - line["median"]) / (total - longest)


class Together:
    """Several works that start at the same time, each on a stream or a thread of its own; `run` joins them."""

    def __init__(self, works: dict[str, Work], mesh: Mesh) -> None:
        self._works = works
        self._run = _Threads(works) if mesh.device.type == "cpu" else _Streams(works, mesh.device)

    def work(self) -> Work:
        works = self._works.values()
        return Work(self._run, lambda: [work.reset() for work in works], lambda: sum(work.off() for work in works))

    def sides(self) -> dict[str, float]:
        """Microseconds from the common start to each side's end, of the last run."""
        return self._run.sides()


class _Threads:
    def __init__(self, works: dict[str, Work]) -> None:
        self._works = works
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="overlap")
        self._sides: dict[str, float] = {}

    def __call__(self) -> None:
        start = time.perf_counter_ns()

        def timed(name: str) -> None:
            self._works[name].run()
            self._sides[name] = (time.perf_counter_ns() - start) / 1e3

        futures = [self._pool.submit(timed, name) for name in self._works if name != PRODUCT]
        if PRODUCT in self._works:
            timed(PRODUCT)
        for future in futures:
            future.result()

    def sides(self) -> dict[str, float]:
        return {name: self._sides[name] for name in self._works}


class _Streams:
    def __init__(self, works: dict[str, Work], device: torch.device) -> None:
        self._works = works
        self._module: Any = torch.get_device_module(device)
        self._streams = {name: self._module.Stream() for name in works}
        self._start = self._module.Event(enable_timing=True)
        self._ends = {name: self._module.Event(enable_timing=True) for name in works}

    def __call__(self) -> None:
        main = self._module.current_stream()
        self._start.record(main)
        for name, stream in self._streams.items():
            stream.wait_stream(main)
            with self._module.stream(stream):
                self._works[name].run()
                self._ends[name].record(stream)
        for stream in self._streams.values():
            main.wait_stream(stream)

    def sides(self) -> dict[str, float]:
        return {name: self._start.elapsed_time(end) * 1e3 for name, end in self._ends.items()}


def _communication(
    name: str, backend: str, config: BenchConfig, mesh: Mesh, group: dist.ProcessGroup
) -> tuple[Work, float]:
    """The work, and the bytes that cross the links of a rank."""
    if name in raw.PLANES:
        block = raw.block_bytes(config.max_size, mesh.world)
        return raw.make_work(raw.BACKENDS[name](group, block, config), block, mesh), float(config.max_size)
    dtype: torch.dtype = getattr(torch, config.dtype)
    transport = backend_factory(backend, collectives.BACKENDS, name)(group)
    num = config.max_size // dtype.itemsize
    work = collectives.make_work(name, transport, num, dtype, mesh, in_place=name == "broadcast")
    return work, config.max_size * collectives.FACTORS[name](mesh.world)


def _product(config: BenchConfig, mesh: Mesh, target_us: float) -> Work:
    """x_TD times w_DF of small whole numbers, whose sums are exact, as often as fills `target_us`."""
    shape, dtype = shapes.shape_of(config), getattr(torch, config.dtype)
    x_TD = _signs(shape.tokens, shape.hidden, mesh.device)
    w_DF = _signs(shape.hidden, shape.expert_hidden, mesh.device)
    want_TF = (x_TD @ w_DF).to(dtype)
    x_TD, w_DF, out_TF = x_TD.to(dtype), w_DF.to(dtype), torch.empty_like(want_TF)

    def repeat(times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                torch.mm(x_TD, w_DF, out=out_TF)

        return run

    once = collectives.checked(repeat(1), out_TF, want_TF)
    times = min(MOST_PRODUCTS, max(1, round(target_us / _alone_us(once, mesh))))
    return collectives.checked(repeat(times), out_TF, want_TF)


def _signs(rows: int, columns: int, device: torch.device) -> Tensor:
    """-1, 0 and 1 in float32."""
    index = torch.arange(rows, device=device).unsqueeze(1) * 5 + torch.arange(columns, device=device) * 7
    return (index % 3 - 1).float()


def _alone_us(work: Work, mesh: Mesh) -> float:
    """About how long it takes, the same number on every rank; not what is reported."""
    wait = torch.accelerator.synchronize if mesh.device.type != "cpu" else lambda: None
    work.run()
    wait()
    start = time.perf_counter_ns()
    for _ in range(3):
        work.run()
    wait()
    elapsed = torch.tensor([(time.perf_counter_ns() - start) / 3e3], device=mesh.device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX, group=mesh.data_group)
    return float(elapsed)
