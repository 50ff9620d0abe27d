"""Rows that each backend of this library sends, counted from the routes: to ranks of other nodes, and of this one.

Legend: T tokens a rank, K routes a token, W ranks, M nodes, L ranks of a node.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeweave.comm.nodes import Nodes


class Rows(NamedTuple):
    """How many rows of a rank's tokens go to other nodes, and to other ranks of a node."""

    across: int
    inside: int


def count(ids_TK: Tensor, rank: int, num_local: int, nodes: Nodes) -> dict[str, Rows]:
    """By the unit that crosses:

    routed: a row a route. paired: a row a token and rank. gathered: every token to every rank, around a ring.
    by_node: a row a token and node between nodes, from there one a token and rank.
    """
    size, length = nodes.num_nodes * nodes.ranks_per_node, nodes.ranks_per_node
    num_tokens = ids_TK.shape[0]
    routes_TW = torch.zeros(num_tokens, size, dtype=torch.int64, device=ids_TK.device)
    routes_TW.scatter_add_(1, ids_TK // num_local, torch.ones_like(ids_TK))
    paired_TW = (routes_TW > 0).long()
    node_W = torch.arange(size) // length

    def split(sent_W: Tensor) -> Rows:
        here = node_W == rank // length
        sent_W = sent_W.cpu()
        return Rows(int(sent_W[~here].sum()), int(sent_W[here].sum() - sent_W[rank]))

    last = nodes.num_nodes > 1 and rank % length == length - 1  # the ring leaves a node from its last rank
    gathered = Rows(num_tokens * (size - 1) * last, num_tokens * (size - 1) * (not last))
    needed_M = paired_TW.view(num_tokens, nodes.num_nodes, length).amax(2).sum(0).cpu()
    # On each node the rank in this one's place writes to the others.
    elsewhere = torch.arange(size) % length != rank % length
    spread = int(paired_TW.sum(0).cpu()[elsewhere].sum())
    by_node = Rows(int(needed_M.sum() - needed_M[rank // length]), spread)
    return {
        "routed": split(routes_TW.sum(0)),
        "paired": split(paired_TW.sum(0)),
        "gathered": gathered,
        "by_node": by_node,
    }


# What each backend sends in dispatch, combine and their backwards.
UNITS = {
    "alltoall": ("routed", "routed", "routed", "routed"),
    "allgather": ("gathered", "routed", "routed", "routed"),
    "allgather_prereduced": ("gathered", "gathered", "routed", "gathered"),
    "onesided": ("paired", "paired", "paired", "paired"),
    "onesided_exact": ("paired", "routed", "routed", "paired"),
    "onesided_static": ("paired", "paired", "paired", "paired"),
    "onesided_static_exact": ("paired", "routed", "routed", "paired"),
    "hierarchical": ("by_node", "by_node", "by_node", "by_node"),
    "torchtitan": ("routed", "routed", "routed", "routed"),
}
