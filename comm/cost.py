"""What a dispatch costs in closed form: rows and bytes that leave a rank, and the time that they take.

Routing is uniform: each token picks K distinct experts of E. A token then needs an expert of a part of n experts with
chance 1 - C(E - n, K) / C(E, K), whatever the other parts. A time is the sum of what a dispatch does one after the
other: messages to other nodes are started, bytes cross a node's network link, bytes are copied inside a node, coded
rows are decoded. The model knows no congestion, no skew, no overlap of the four and no time to code own tokens.

Legend: T tokens a rank, D width, K routes a token, E experts, W ranks, M nodes, L ranks of a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moeweave.comm.codec import wire_width
from moeweave.comm.nodes import Nodes

MODELLED = ("alltoall", "allgather", "onesided", "hierarchical")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is dispatched: T tokens a rank of D columns, K of E experts each; the format and scale of their rows."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    format: str = "none"
    scale: str = "token"

    @property
    def row_bytes(self) -> int:
        return wire_width(self.format, self.scale, self.hidden, self.dtype)

    @property
    def plain_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    @property
    def about_bytes(self) -> int:
        """Of a token that crosses between nodes: an id and a weight a route."""
        return 8 * self.top_k


@dataclass(frozen=True, kw_only=True)
class Links:
    """What a dispatch runs over.

    Attributes:
        network: bytes a second that a node's ranks send together, one way.
        local: bytes a second that a node's ranks copy together.
        latency: seconds that a message between nodes takes before it carries anything.
        decode: bytes a second of decoded rows that a node's ranks make together.
    """

    network: float
    local: float
    latency: float
    decode: float = math.inf


@dataclass(frozen=True)
class Cost:
    """Of one dispatch.

    Attributes:
        network_bytes: that leave a rank's node, an average rank's share.
        local_bytes: that an average rank writes to other ranks of its node.
        seconds: until the last rank has its rows.
    """

    network_bytes: float
    local_bytes: float
    seconds: float


def needed_parts(num_experts: int, top_k: int, parts: int) -> float:
    """Parts of equal size that a token needs on average: 256 experts, top-8, 4 parts: 3.62."""
    if top_k == 0:
        return 0.0
    elsewhere = num_experts - num_experts // max(parts, 1)
    return parts * (1 - math.comb(elsewhere, top_k) / math.comb(num_experts, top_k))


def remote_ranks(num_experts: int, top_k: int, ep: int) -> float:
    """Other ranks that a token needs on average under uniform routing: (ep - 1) * P(one of its experts lies there).

    256 experts, top-8, ep 4: 2.71. 8 experts, top-2, ep 4: 1.39.
    """
    return 0.0 if ep <= 1 else needed_parts(num_experts, top_k, ep) * (ep - 1) / ep


def dispatch_rows(dispatcher: str, sizes: Tokens, nodes: Nodes) -> tuple[float, float]:
    """Rows of an average rank that cross to other nodes, and to other ranks of a node.

    "onesided" is counted as if windows reached over the network.
    """
    M, L = nodes.num_nodes, nodes.ranks_per_node
    W = M * L
    if dispatcher == "alltoall":
        a_rank = sizes.tokens * sizes.top_k / W
    elif dispatcher == "allgather":  # around a ring, which leaves each node once
        crossing = sizes.tokens * (W - 1) / L * (M > 1)
        return crossing, sizes.tokens * (W - 1) - crossing
    else:
        a_rank = sizes.tokens * needed_parts(sizes.experts, sizes.top_k, W) / W
    if dispatcher != "hierarchical":
        return a_rank * (W - L), a_rank * (L - 1)
    # What a rank took from all nodes it spreads to the ranks of its own.
    return sizes.tokens * remote_ranks(sizes.experts, sizes.top_k, M), a_rank * M * (L - 1)


def decoded_rows(dispatcher: str, sizes: Tokens, nodes: Nodes) -> float:
    """Rows that an average rank decodes: every one that it takes, its own included."""
    W = nodes.num_nodes * nodes.ranks_per_node
    if dispatcher in ("alltoall", "allgather"):
        return sizes.tokens * (sizes.top_k if dispatcher == "alltoall" else W)
    return sizes.tokens * needed_parts(
        sizes.experts, sizes.top_k, nodes.num_nodes if dispatcher == "hierarchical" else W
    )


def dispatch_cost(dispatcher: str, sizes: Tokens, nodes: Nodes, links: Links) -> Cost:
    """Bytes and time of a dispatch without a cached layout. Raises ValueError for an unknown dispatcher."""
    if dispatcher not in MODELLED:
        raise ValueError(f"dispatcher ({dispatcher!r}) must be one of {', '.join(MODELLED)} to be modelled.")
    across, inside = dispatch_rows(dispatcher, sizes, nodes)
    hierarchical = dispatcher == "hierarchical"
    network = across * (sizes.row_bytes + hierarchical * sizes.about_bytes)
    local = inside * (sizes.plain_bytes if hierarchical else sizes.row_bytes)
    # Every route's row is written once more where it ends, by expert.
    copied = local + sizes.tokens * sizes.top_k * sizes.plain_bytes
    M, L = nodes.num_nodes, nodes.ranks_per_node
    rounds = (dispatcher != "onesided") + 1  # what to expect, then the rows
    peers = M if dispatcher in ("hierarchical", "allgather") else M * L
    seconds = links.latency * rounds * (peers - peers // M) + network * L / links.network + copied * L / links.local
    if sizes.format != "none":
        seconds += decoded_rows(dispatcher, sizes, nodes) * sizes.plain_bytes * L / links.decode
    return Cost(network, local, seconds)
