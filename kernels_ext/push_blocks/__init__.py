"""Contiguous blocks written by this device's cores into the memory of every other rank.

What it is for: the floor under any exchange that cores carry out, and how many of them saturate a link. The caller
publishes the writes (a barrier of the windows); the kernel does not.
Letters: W ranks, N bytes of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeweave.kernels_ext.push_blocks import reference, triton_impl
from moeweave.kernels_ext.registry import Implementation, Op, select

__all__ = ["OP", "PeerWindows", "push"]


@dataclass(frozen=True)
class PeerWindows:
    """The windows of all ranks, as this rank sees them.

    Attributes:
        windows: one uint8 [W, N] for each rank; row s of window p is what rank s gave rank p. Rows may lie apart, as
            far in every window.
        addresses: int64 [W] on the device, where each window begins.
        rank: this rank.
    """

    windows: Sequence[Tensor]
    addresses: Tensor
    rank: int

    @staticmethod
    def of(windows: Sequence[Tensor], rank: int) -> PeerWindows:
        """Looks the addresses up."""
        addresses = [window.data_ptr() for window in windows]
        return PeerWindows(windows, torch.tensor(addresses, dtype=torch.int64, device=windows[rank].device), rank)


class _PushBlocks(Implementation, Protocol):
    def push(self, x_WN: Tensor, peers: PeerWindows, num_programs: int) -> None: ...


OP: Op[_PushBlocks] = Op("push_blocks", (triton_impl, reference))


def push(x_WN: Tensor, peers: PeerWindows, *, num_programs: int = 0, impl: str = "auto") -> None:
    """Write row p of `x_WN` to row `rank` of rank p's window, for every p but this rank.

    x_WN: uint8 [W, N], each row contiguous; rows may lie apart, or be one row (expanded). num_programs: how many
    programs of the kernel share the work; 0 is one for each multiprocessor. Raises ValueError on other shapes, or an
    impl that cannot run.
    """
    shape = tuple(peers.windows[peers.rank].shape)
    if x_WN.dtype != torch.uint8 or x_WN.shape != shape:
        raise ValueError(
            f"x ({x_WN.dtype}, {tuple(x_WN.shape)}) must be uint8 {shape}, as the windows are. View it so."
        )
    select(OP, x_WN, peers.windows[peers.rank], impl=impl).push(x_WN, peers, num_programs)
