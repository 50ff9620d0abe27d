"""CUDA engines by name: one for each group and window, shared by its dispatchers, gone with them.

Operators name their engine, as torch's own collectives name their group: a custom operator takes no objects.
"""

from __future__ import annotations

import itertools
import weakref

import torch
import torch.distributed as dist

from moeweave.comm.onesided_cuda import CudaEngine
from moeweave.comm.onesided_launch import Budget
from moeweave.comm.windows_cuda import CudaWindow, SymmetricWindow, WindowMap

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
        engine = open_engine(window, window_map, timeout=_timeout_of(group), budget=Budget.of(device, num_sms))
        engines[key] = engine
    return engine


def open_engine(window: CudaWindow, window_map: WindowMap, *, timeout: float, budget: Budget) -> CudaEngine:
    """A named engine over a window that exists."""
    engine = CudaEngine(window, window_map, timeout=timeout, budget=budget)
    engine.name = f"onesided-cuda-{next(_NAMES)}"
    _NAMED[engine.name] = engine
    return engine


def cuda_engine_named(name: str) -> CudaEngine:
    """Raises RuntimeError if its dispatchers are gone."""
    engine = _NAMED.get(name)
    if engine is None:
        raise RuntimeError(f"engine ({name!r}) must be open: its dispatcher is gone. Keep the dispatcher.")
    return engine


def _timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds: the process group's own timeout."""
    backend = group._get_backend(torch.device("cuda")) if "nccl" in dist.get_backend(group) else None
    options = getattr(backend, "options", None)
    timeout = getattr(options, "_timeout", None) or dist.distributed_c10d.default_pg_timeout
    return float(timeout.total_seconds())
