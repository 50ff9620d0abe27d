"""`kernel_times=true`: how long the profiler says that an iteration's kernels take, beside the time that was measured.

On CUDA it is the time from the start of the first kernel or copy that an iteration launched to the end of the last
(CUPTI, through torch.profiler): several of them, on several streams, with the gaps between them. What belongs to an
iteration follows from where it was launched: inside the host's range "run", by any thread, directly or by a graph. So
neither the kernel that holds the device while hosts launch, nor the flush, nor the barrier is counted: they are
launched before that range. The measured time is taken between two events around the same work and is longer by what
lies between them and the kernels, a few microseconds.

A kernel of NCCL, and any other that meets its peers, runs from its own start: it waits on the device for the last rank.
The time of the slowest rank, `kernel`, has that wait in it, and with it what is left of the skew between ranks after
the barrier; the rank that comes last waits for nobody, so that the least over ranks, `kernel_least`, is what the
exchange itself takes. A rank that rests (in `pairs`, say) has no kernels and does not count.

On a CPU both are of the range itself.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

RUN = "run"  # the name of the range around what is timed
_LAUNCH = re.compile(r"(cu|hip)[A-Za-z]*[A-Z]")  # cudaLaunchKernel, cuLaunchKernelEx, cudaMemcpyAsync, cudaGraphLaunch


def times(events: Iterable[Any], device: str) -> list[float]:
    """Microseconds of each iteration, in order, 0 where it ran nothing on the device.

    Args:
        events: of `profile.profiler.kineto_results.events()`.
        device: "cpu", or what the kernels run on.
    """
    found = list(events)
    hosts = [event for event in found if event.device_type() == DeviceType.CPU]
    ranges = sorted((event.start_ns(), event.end_ns()) for event in hosts if event.name() == RUN)
    if device == "cpu":
        return [(end - start) / 1e3 for start, end in ranges]
    # A kernel has the number of the call that launched it; those of a graph share that of the graph's launch.
    launched_at = {event.correlation_id(): event.start_ns() for event in hosts if _LAUNCH.match(event.name())}
    spans: list[list[tuple[int, int]]] = [[] for _ in ranges]
    for event in found:
        if event.device_type() == DeviceType.CPU or event.is_user_annotation():
            continue
        at = launched_at.get(event.correlation_id(), 0)
        index = bisect.bisect_right(ranges, at, key=lambda span: span[0]) - 1
        if index >= 0 and at <= ranges[index][1]:
            spans[index].append((event.start_ns(), event.end_ns()))
    return [(max(end for _, end in span) - min(start for start, _ in span)) / 1e3 if span else 0.0 for span in spans]
