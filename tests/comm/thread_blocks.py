"""`CudaBlocks` on a CPU: ranks are threads, windows plain tensors, signals a condition; areas and their reuse real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from moeweave.comm.blocks_cuda import Area, CudaBlocks

T = TypeVar("T")
SECONDS = 60.0


@dataclass
class World:
    """What threads share.

    Attributes:
        acked, arrived: last round by (channel, writer, reader).
        opening: (rank, channel) by number of times that an exchange was opened.
        memory: windows by name, of all ranks.
    """

    size: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    acked: dict[tuple[int, int, int], int] = field(default_factory=dict)
    arrived: dict[tuple[int, int, int], int] = field(default_factory=dict)
    opening: dict[tuple[int, int], int] = field(default_factory=dict)
    memory: dict[Area, list[Tensor]] = field(default_factory=dict)

    def wait(self, reached: Callable[[], bool], what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(reached, SECONDS), what

    def run(self, task: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(task, range(self.size)))

    def link(self, rank: int) -> CudaBlocks:
        return CudaBlocks(self.size, lambda area: ThreadWindow(self, rank, area), ThreadSignals(self, rank))


class ThreadWindow:
    def __init__(self, world: World, rank: int, area: Area) -> None:
        with world.changed:
            full = world.memory.setdefault(
                area, [torch.full((area.num_bytes,), 255, dtype=torch.uint8) for _ in range(world.size)]
            )
        self.rank, self.size, self._memory = rank, world.size, full
        self.peers = torch.tensor([memory.data_ptr() for memory in full])

    def of(self, rank: int) -> Tensor:
        return self._memory[rank]


class ThreadSignals:
    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.rounds = world, rank, [0] * 32

    def open(self, channel: int, read: int) -> None:
        world, ranks = self.world, range(self.world.size)
        with world.changed:
            for n in range(32):
                if read >> n & 1:
                    world.acked.update({(n, writer, self.rank): self.rounds[n] for writer in ranks})
            world.opening[self.rank, channel] = world.opening.get((self.rank, channel), 0) + 1
            world.changed.notify_all()
        sent = self.rounds[channel]
        world.wait(lambda: all(world.acked.get((channel, self.rank, w), 0) == sent for w in ranks), "acknowledgement")

    def close(self, channel: int, arrived: Tensor) -> None:
        world, ranks, sent = self.world, range(self.world.size), self.rounds[channel] + 1
        with world.changed:
            world.arrived.update({(channel, self.rank, reader): sent for reader in ranks})
            world.changed.notify_all()
        world.wait(lambda: all(world.arrived.get((channel, w, self.rank), 0) == sent for w in ranks), "arrival")
        self.rounds[channel] = sent

    def check(self) -> None:
        return None
