"""The engine of a group: made by all its ranks together, shared by its dispatchers, gone with the group.

Operators name it, as torch's own collectives name their group: a custom operator takes no objects.
"""

from __future__ import annotations

import itertools
import weakref

import torch.distributed as dist

from moeweave.comm.onesided import Engine
from moeweave.comm.onesided_cpu import CpuEngine
from moeweave.comm.rounds import Exchange

_NAMES = itertools.count()
_NAMED: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_OF_GROUP: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[str, Engine]] = weakref.WeakKeyDictionary()


def engine_of(group: dist.ProcessGroup | None) -> tuple[str, Engine]:
    """The engine of `group` and its name; of a rank alone a new one, which the caller must keep.

    Raises:
        RuntimeError: the ranks of the group cannot share memory.
    """
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
