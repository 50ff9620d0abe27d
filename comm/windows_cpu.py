"""Windows on the CPU of one host: a memfd region a rank, mapped by its peers.

The descriptors travel over the sockets of `Peers`; nothing has a name in a file system, so nothing is left after a
kill, and the size limit of /dev/shm does not apply. Pages take memory when they are first written.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


def create_memory(num_bytes: int) -> tuple[int, Tensor]:
    """A descriptor, to be closed once it was sent, and shared memory as uint8 [num_bytes]; num_bytes > 0."""
    fd = os.memfd_create("moeweave-window", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd, map_memory(fd)


def map_memory(fd: int) -> Tensor:
    """The memory behind a descriptor as uint8; unmapped when the last tensor over it is gone."""
    return torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)


class SharedWindows:
    """`Windows` over memory that was mapped already; windows_WB[r] is rank r's."""

    def __init__(self, rank: int, windows_WB: list[Tensor]) -> None:
        self.rank, self.size = rank, len(windows_WB)
        self.num_bytes = windows_WB[rank].numel()
        self._windows = windows_WB

    def of(self, rank: int) -> Tensor:
        return self._windows[rank]

    def close(self) -> None:
        self._windows = []
