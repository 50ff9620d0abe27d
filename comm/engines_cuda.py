"""CUDA engines by name: one for each group and window, shared by its dispatchers, gone with them.

Operators name their engine, as torch's own collectives name their group: a custom operator takes no objects.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from moeweave.comm.nodes import hosts_of
from moeweave.comm.onesided_cuda import CudaEngine
from moeweave.comm.onesided_launch import Budget
from moeweave.comm.onesided_runtime import Runtime
from moeweave.comm.watchdog import watch
from moeweave.comm.windows_cuda import CudaWindow, SymmetricWindow, WindowMap
from moeweave.kernels_ext import onesided

_NAMES = itertools.count()
_NAMED: weakref.WeakValueDictionary[str, CudaEngine] = weakref.WeakValueDictionary()
_OF_GROUP: weakref.WeakKeyDictionary[
    dist.ProcessGroup, weakref.WeakValueDictionary[tuple[WindowMap, int | None], CudaEngine]
]
_OF_GROUP = weakref.WeakKeyDictionary()


def cuda_engine_of(
    group: dist.ProcessGroup, window_map: WindowMap, device: torch.device, num_sms: int | None
) -> CudaEngine:
    """The engine of `group` for windows of this map; the first call is a collective that allocates them."""
    engines, key = _OF_GROUP.setdefault(group, weakref.WeakValueDictionary()), (window_map, num_sms)
    engine = engines.get(key)
    if engine is None:
        window = SymmetricWindow(group, window_map, device)
        budget = Budget.of(device, num_sms, window_map.max_tokens)
        engine = open_engine(window, window_map, timeout=timeout_of(group), budget=budget)
        engines[key] = engine
        watch(engine.launcher)
    return engine


def open_engine(
    window: CudaWindow, window_map: WindowMap, *, timeout: float, budget: Budget, runtime: Runtime | None = None
) -> CudaEngine:
    """A named engine over a window that exists."""
    engine = CudaEngine(window, window_map, timeout=timeout, budget=budget, runtime=runtime)
    engine.name = f"onesided-cuda-{next(_NAMES)}"
    _NAMED[engine.name] = engine
    return engine


def cuda_engine_named(name: str) -> CudaEngine:
    """Raises RuntimeError if its dispatchers are gone."""
    engine = _NAMED.get(name)
    if engine is None:
        raise RuntimeError(f"engine ({name!r}) must be open: its dispatcher is gone. Keep the dispatcher.")
    return engine


class Place(NamedTuple):
    """Where a rank's GPU is.

    Attributes:
        reason: why the kernels cannot run there, or None.
        host: of the rank, None if it is not known.
        device: index of its GPU among those that its process sees.
        reaches: for each of these, whether the rank's GPU can write into its memory.
    """

    reason: str | None
    host: Hashable
    device: int
    reaches: tuple[bool, ...]


def apart(places: Sequence[Place]) -> str | None:
    """None if the ranks' GPUs can all write into each other's memory, or why not."""
    for rank, place in enumerate(places):
        if place.reason is not None:
            return f"rank {rank} {place.reason}"
    if None in [place.host for place in places] or len({place.host for place in places}) > 1:
        return "the ranks are on several hosts"
    if len({place.device for place in places}) < len(places):
        return "the ranks see one GPU each, or share one: who reaches whom is not known without a topology file"
    for rank, place in enumerate(places):
        for other, there in enumerate(places):
            if other != rank and not (there.device < len(place.reaches) and place.reaches[there.device]):
                return f"rank {rank} cannot write into rank {other}'s memory"
    return None


def gpus_apart(group: dist.ProcessGroup) -> str | None:
    """`apart` of a group with a CUDA backend, the same on every rank. A collective."""
    mine, count = torch.cuda.current_device(), torch.cuda.device_count()
    reaches = tuple(other == mine or torch.cuda.can_device_access_peer(mine, other) for other in range(count))
    place = Place(onesided.supports(torch.device("cuda", mine)), hosts_of(group)[dist.get_rank(group)], mine, reaches)
    places: list[Place] = [place] * dist.get_world_size(group)
    dist.all_gather_object(places, place, group=group)
    return apart(places)


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds: the process group's own timeout."""
    backend = group._get_backend(torch.device("cuda")) if "nccl" in dist.get_backend(group) else None
    options = getattr(backend, "options", None)
    timeout = getattr(options, "_timeout", None) or dist.distributed_c10d.default_pg_timeout
    return float(timeout.total_seconds())
