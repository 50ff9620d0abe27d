"""The engine of a group: made by all its ranks together, shared by its dispatchers, gone with the group.

Operators name it, as torch's own collectives name their group: a custom operator takes no objects.
"""

from __future__ import annotations

import itertools
import weakref

import torch.distributed as dist

from moeweave.comm.communicator import Communicator
from moeweave.comm.nodes import Nodes, UnevenNodes, hosts_of
from moeweave.comm.onesided import Engine
from moeweave.comm.onesided_cpu import CpuEngine
from moeweave.comm.onesided_nodes import NodeEngine
from moeweave.comm.onesided_parts import PartEngine
from moeweave.comm.rounds import Exchange
from moeweave.comm.streams import Streams
from moeweave.comm.topology import Topology

_NAMES = itertools.count()
_NAMED: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_OF_GROUP: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[str, Engine]] = weakref.WeakKeyDictionary()
_OF_NODES: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Nodes, tuple[str, NodeEngine]]] = (
    weakref.WeakKeyDictionary()
)
_ACROSS: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Nodes, Communicator]] = weakref.WeakKeyDictionary()


def shares_memory(group: dist.ProcessGroup | None) -> bool:
    """The ranks of `group` can write into each other's memory: CPU ranks of one host. A collective the first time."""
    if group is None or dist.get_backend(group) != "gloo":
        return False
    hosts = hosts_of(group)
    return None not in hosts and len(set(hosts)) == 1


def nodes_of(group: dist.ProcessGroup | None, topology: Topology | None = None) -> Nodes | None:
    """`Nodes.found` of CPU ranks; None where they are none, or lie unevenly. A collective the first time.

    Raises:
        ValueError: a node of `topology` whose ranks are on several hosts.
    """
    if group is None or dist.get_backend(group) != "gloo" or None in hosts_of(group):
        return None
    try:
        return Nodes.found(group, topology)
    except UnevenNodes:
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


def node_engine_of(group: dist.ProcessGroup | None, nodes: Nodes) -> tuple[str, NodeEngine]:
    """The engine of `group` as these nodes, and its name; of a rank alone a new one, which the caller must keep.

    Raises:
        ValueError: the group is no CPU group.
        RuntimeError: ranks of one node are on several hosts.
    """
    if group is not None and dist.get_backend(group) != "gloo":
        raise ValueError(
            f"dispatcher ('hierarchical') needs a gloo group of CPU ranks, this one is {dist.get_backend(group)}. "
            "Use dispatcher='alltoall' or 'onesided'."
        )
    known = {} if group is None else _OF_NODES.setdefault(group, {})
    if nodes in known:
        return known[nodes]
    inside, across = nodes.split(group)
    name, engine = f"nodes-{next(_NAMES)}", NodeEngine(nodes, engine_of(inside)[1], Communicator(across))
    _NAMED[name] = engine
    known[nodes] = name, engine
    return name, engine


def part_engine_of(
    push: dist.ProcessGroup | None, dma: dist.ProcessGroup | None, nodes: Nodes, streams: Streams, num_parts: int
) -> tuple[str, Engine]:
    """A new engine over two groups of the same ranks as these nodes, and its name; the caller must keep it. Windows
    and groups between nodes are those of `push`, and of all that were made over the same two.

    Raises as `node_engine_of` does.
    """
    _, whole = node_engine_of(push, nodes)
    known = {} if dma is None else _ACROSS.setdefault(dma, {})
    if nodes not in known:
        known[nodes] = Communicator(nodes.across(dma))
    name = f"parts-{next(_NAMES)}"
    engine = PartEngine(nodes, whole.inside, whole.across, known[nodes], streams, num_parts)
    _NAMED[name] = engine
    return name, engine


def engine_named(name: str) -> Engine:
    """Raises RuntimeError if the group that it belonged to is gone."""
    engine = _NAMED.get(name)
    if engine is None:
        raise RuntimeError(f"engine ({name!r}) must be open: its process group was destroyed. Make a new dispatcher.")
    return engine
