"""Blocks to peers by one copy each: on CUDA the copy engines do them, on a CPU the calling thread.

Letters: W ranks, N bytes of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from moeweave.kernels_ext.push_blocks import PeerWindows

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def push(x_WN: Tensor, peers: PeerWindows, num_programs: int = 0) -> None:
    """Rank 1 of 4 writes to 2, 3, 0 in this order, so that no two ranks begin with the same peer."""
    num_ranks = len(peers.windows)
    for step in range(1, num_ranks):
        peer = (peers.rank + step) % num_ranks
        peers.windows[peer][peers.rank].copy_(x_WN[peer])
