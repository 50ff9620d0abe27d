"""Memory that an operation needs at its highest, beyond what is allocated before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the highest point of one run, over those before it; on a CPU as the profiler sees torch's allocator."""
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        run()
        module.synchronize()
        return int(module.max_memory_allocated() - before)
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events: Any = profile.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in steps:
        now += change
        most = max(most, now)
    return most
