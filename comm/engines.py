"""The engine of a group: made by all its ranks together, shared by its dispatchers, gone with the group.

Operators name it, as torch's own collectives name their group: a custom operator takes no objects.
"""

from __future__ import annotations

import itertools
import weakref

import torch.distributed as dist

from moeweave.comm.onesided import Engine
from moeweave.comm.onesided_cpu import CpuEngine
from moeweave.comm.peers import same_host
from moeweave.comm.rounds import Exchange

_NAMES = itertools.count()
_NAMED: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_SHARES: weakref.WeakKeyDictionary[dist.ProcessGroup, bool] = weakref.WeakKeyDictionary()
_OF_GROUP: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[str, Engine]] = weakref.WeakKeyDictionary()


def shares_memory(group: dist.ProcessGroup | None) -> bool:
    """The ranks of `group` can write into each other's memory: CPU ranks of one host. A collective the first time."""
    if group is None or dist.get_backend(group) != "gloo":
        return False
    if group not in _SHARES:
        _SHARES[group] = same_host(group) is None
    return _SHARES[group]


def engine_of(group: dist.ProcessGroup | None) -> tuple[str, Engine]:
    """The engine of `group` and its name; of a rank alone a new one, which the caller must keep.

    Raises:
        ValueError: the group is no CPU group.
        RuntimeError: its ranks are on several hosts.
    """
    if group is not None and dist.get_backend(group) != "gloo":
        raise ValueError(
            f"dispatcher ('onesided') needs a gloo group of CPU ranks, this one is {dist.get_backend(group)}. "
            "Use dispatcher='alltoall' or 'allgather'."
        )
    if group is not None and group in _OF_GROUP:
        return _OF_GROUP[group]
    name, engine = f"onesided-{next(_NAMES)}", CpuEngine(Exchange(group))
    _NAMED[name] = engine
    if group is not None:
        _OF_GROUP[group] = name, engine
    return name, engine


def engine_named(name: str) -> Engine:
    """Raises RuntimeError if the group that it belonged to is gone."""
    engine = _NAMED.get(name)
    if engine is None:
        raise RuntimeError(f"engine ({name!r}) must be open: its process group was destroyed. Make a new dispatcher.")
    return engine
