"""The engine of a group: made by all its ranks together, shared by its dispatchers, gone with the group.

Operators name it, as torch's own collectives name their group: a custom operator takes no objects.
"""

from __future__ import annotations

import itertools
import weakref

import torch.distributed as dist

from moeweave.comm.communicator import Communicator
from moeweave.comm.nodes import Nodes, hosts_of
from moeweave.comm.onesided import Engine
from moeweave.comm.onesided_cpu import CpuEngine
from moeweave.comm.onesided_nodes import NodeEngine
from moeweave.comm.rounds import Exchange

_NAMES = itertools.count()
_NAMED: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_OF_GROUP: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[str, Engine]] = weakref.WeakKeyDictionary()
_OF_NODES: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Nodes, tuple[str, Engine]]] = weakref.WeakKeyDictionary()


def shares_memory(group: dist.ProcessGroup | None) -> bool:
    """The ranks of `group` can write into each other's memory: CPU ranks of one host. A collective the first time."""
    if group is None or dist.get_backend(group) != "gloo":
        return False
    hosts = hosts_of(group)
    return None not in hosts and len(set(hosts)) == 1


def nodes_of(group: dist.ProcessGroup | None) -> Nodes | None:
    """How the ranks of `group` lie on hosts whose ranks share memory; None where they are no CPU ranks or lie
    unevenly. A collective the first time."""
    if group is None or dist.get_backend(group) != "gloo" or None in hosts_of(group):
        return None
    try:
        return Nodes.found(group)
    except ValueError:
        return None


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


def node_engine_of(group: dist.ProcessGroup | None, nodes: Nodes) -> tuple[str, Engine]:
    """The engine of `group` as these nodes, and its name; of a rank alone a new one, which the caller must keep.

    Raises as `engine_of` does.
    """
    known = {} if group is None else _OF_NODES.setdefault(group, {})
    if nodes in known:
        return known[nodes]
    inside, across = nodes.split(group)
    name, engine = f"nodes-{next(_NAMES)}", NodeEngine(nodes, engine_of(inside)[1], Communicator(across))
    _NAMED[name] = engine
    known[nodes] = name, engine
    return name, engine


def engine_named(name: str) -> Engine:
    """Raises RuntimeError if the group that it belonged to is gone."""
    engine = _NAMED.get(name)
    if engine is None:
        raise RuntimeError(f"engine ({name!r}) must be open: its process group was destroyed. Make a new dispatcher.")
    return engine
