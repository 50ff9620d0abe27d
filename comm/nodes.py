"""Which ranks of a group share a node, and the two groups that each rank then belongs to.

    scale-up    the ranks of its node: they write into each other's memory
    scale-out   the ranks in its place on the other nodes: what crosses the network goes between these alone, so every
                rank of a node carries its share

Example, 2 nodes of 2 ranks, nodes (0, 0, 1, 1): rank 3 is in scale-up group [2, 3] and scale-out group [1, 3].
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moeweave.comm.peers import host_name
from moeweave.comm.topology import Topology

_HOSTS: weakref.WeakKeyDictionary[dist.ProcessGroup, list[str | None]] = weakref.WeakKeyDictionary()


def hosts_of(group: dist.ProcessGroup) -> list[str | None]:
    """The host of each rank, None where there is no /proc of Linux. A collective the first time, equal on all ranks."""
    if group not in _HOSTS:
        hosts: list[Any] = [None] * dist.get_world_size(group)
        try:
            host: str | None = host_name()
        except OSError:
            host = None
        dist.all_gather_object(hosts, host, group=group)
        _HOSTS[group] = hosts
    return _HOSTS[group]


class UnevenNodes(ValueError):
    """Nodes of unequal size, or whose ranks are not neighbours."""


@dataclass(frozen=True)
class Nodes:
    """A group's ranks as equal nodes, one after the other.

    Attributes:
        num_nodes, ranks_per_node: M and L; rank r is in place r % L of node r // L.
    """

    num_nodes: int
    ranks_per_node: int

    @classmethod
    def of(cls, node_W: Sequence[Hashable]) -> Nodes:
        """From the node of each rank, named as one likes.

        Raises:
            UnevenNodes: nodes of unequal size, or whose ranks are not neighbours.
        """
        size, names = len(node_W), list(dict.fromkeys(node_W))
        length = size // len(names)
        wanted = [name for name in names for _ in range(length)]
        if list(node_W) != wanted:
            shown = ", ".join(str(names.index(each)) for each in node_W)
            raise UnevenNodes(
                f"nodes ({shown}) must hold equally many ranks of the expert group each, one node after the other, for "
                "dispatcher='hierarchical'. Start as many ranks on each host, or use dispatcher='alltoall'."
            )
        return cls(len(names), length)

    @classmethod
    def found(cls, group: dist.ProcessGroup | None, topology: Topology | None = None) -> Nodes:
        """From `topology` where it is of this job's ranks, else from the hosts of the group's ranks; a rank without a
        known host is a node of its own. A collective.

        Raises:
            ValueError: as `of`; a node of `topology` whose ranks are on several hosts.
        """
        if group is None:
            return cls(1, 1)
        hosts = [rank if host is None else host for rank, host in enumerate(hosts_of(group))]
        measured = None if topology is None else topology.nodes_in(group)
        if measured is None:
            return cls.of(hosts)
        home: dict[int, tuple[int, Hashable]] = {}
        for rank, (node, host) in enumerate(zip(measured, hosts, strict=True)):
            first, expected = home.setdefault(node, (rank, host))
            if host != expected:
                raise ValueError(
                    f"topology: ranks {first} and {rank} of the expert group must be on one host, as they share memory "
                    "there. Measure these ranks with `moeweave-bench op=topology`, or leave topology out."
                )
        return cls.of(measured)

    def split(self, group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """This rank's scale-up and scale-out groups, None where it would be alone. A collective over `group`."""
        if group is None:
            return None, None
        first = dist.get_rank(group) // self.ranks_per_node * self.ranks_per_node
        inside = dist.get_process_group_ranks(group)[first : first + self.ranks_per_node]
        return _made(inside, group), self.across(group)

    def across(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """A scale-out group alone. A collective over `group`."""
        if group is None:
            return None
        place = dist.get_rank(group) % self.ranks_per_node
        return _made(dist.get_process_group_ranks(group)[place :: self.ranks_per_node], group)


def _made(members: list[int], group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    if len(members) == 1:
        return None
    return dist.new_group(members, backend=dist.get_backend(group), use_local_synchronization=True)
