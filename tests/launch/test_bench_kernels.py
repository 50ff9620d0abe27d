"""The profiler's time of an iteration: of which kernels it is made on a GPU, and that a CPU run has the column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch.autograd import DeviceType

from moeweave.launch.bench import kernels, report
from moeweave.launch.bench.program import bench
from moeweave.launch.schema import BenchConfig
from run_ranks import run_ranks


@dataclass
class Event:
    """What torch's profiler hands over, in nanoseconds."""

    kind: str
    label: str
    start: int
    end: int
    number: int

    def name(self) -> str:
        return self.label

    def device_type(self) -> DeviceType:
        return DeviceType.CPU if self.kind == "host" else DeviceType.CUDA

    def is_user_annotation(self) -> bool:
        return self.label == kernels.RUN

    def start_ns(self) -> int:
        return self.start

    def end_ns(self) -> int:
        return self.end

    def correlation_id(self) -> int:
        return self.number


def iteration(at: int, number: int) -> list[Event]:
    """Flush, hold and barrier; then two kernels on two streams, which start while the hosts have long gone on."""
    return [
        Event("host", "flush and barrier", at, at + 900, 1),
        Event("host", "cudaLaunchKernel", at + 100, at + 200, number),
        Event("device", "spin_kernel", at + 300, at + 500_000, number),
        Event("host", "cudaLaunchKernel", at + 300, at + 400, number + 1),
        Event("device", "ncclDevKernel_AllReduce", at + 500_000, at + 510_000, number + 1),
        Event("host", kernels.RUN, at + 1_000, at + 3_000, 2),
        Event("host", "aten::copy_", at + 1_100, at + 1_400, number),  # operators have numbers of their own
        Event("host", "cudaMemcpyAsync", at + 1_200, at + 1_300, number + 2),
        Event("device", "Memcpy PtoP", at + 511_000, at + 540_000, number + 2),
        Event("host", "cuLaunchKernelEx", at + 2_000, at + 2_100, number + 3),  # by another thread, if need be
        Event("device", "push_kernel", at + 512_500, at + 561_500, number + 3),
        Event("device", kernels.RUN, at, at + 900_000, number + 3),  # the range, as the profiler draws it on the device
    ]


def test_kernels_are_of_the_iteration_that_launched_them() -> None:
    graph = [
        Event("host", kernels.RUN, 3_000_000, 3_001_000, 2),
        Event("host", "cudaGraphLaunch", 3_000_100, 3_000_200, 40),
        Event("device", "first", 3_050_000, 3_051_000, 40),
        Event("device", "second", 3_070_000, 3_072_000, 40),
        Event("host", "cudaLaunchKernel", 3_002_000, 3_002_100, 41),  # after the range: the reduction of the times
        Event("device", "ncclDevKernel_AllReduce", 3_080_000, 3_090_000, 41),
    ]
    resting = [Event("host", kernels.RUN, 4_000_000, 4_001_000, 2)]
    events = [*graph, *resting, *iteration(2_000_000, 20), *iteration(0, 10)]
    assert kernels.times(events, "cuda") == [50.5, 50.5, 22.0, 0.0]
    assert kernels.times(events, "cpu") == [2.0, 2.0, 1.0, 1.0]


def lines(world: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = dict(device="cpu", iterations=3, warmup=1, min_size=96, max_size=96, tokens=5, hidden=8, experts=4, topk=2)
    return bench(BenchConfig(**sizes | values), world)


@pytest.mark.parametrize("average", [False, True])
def test_cpu_ranks_have_the_column(average: bool) -> None:
    values = dict(op=["all_reduce", "pairs", "raw", "dispatch"], kernel_times=True, average=average)
    found = run_ranks(2, lines, 2, values)
    for line in found[0]:
        assert 0 < line["kernel_least"] <= line["kernel"]
        assert line["wrong"] == 0
        assert len(line["times"]) == (5 if average else 3)
    assert [[line["kernel"] for line in rank] for rank in found] == [[line["kernel"] for line in found[0]]] * 2
    header = next(row for row in report.table(found[0], found[0][0]["context"]).splitlines() if "size" in row)
    assert header.split()[7:14] == ["time", "min", "p95", "p99", "host", "kernel", "algbw"]


def test_without_it_there_is_no_column() -> None:
    found = run_ranks(2, lines, 2, {})[0]
    assert "kernel" not in found[0]
    assert "kernel" not in report.table(found, found[0]["context"])
