"""Exchanges that are shared out over the two planes: part on `push`, the rest on `dma`, at the same time.

`TwoPlanes` are collectives over a group a plane, split by columns. `window_planes` are writes into the peers' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.communicator import Communicator
from moeweave.comm.pending import Pending
from moeweave.comm.streams import Streams

ALIGN = 16  # bytes: what a device core stores at once


class Planes(Protocol):
    """What the three-stream schedule sends over. Every rank makes the same calls in the same order.

    What an exchange brought is read before the next one is started: it may be memory that peers write again.
    """

    def all_gather(self, name: str, x_MD: Tensor) -> Pending[Tensor]:
        """[M, D] of the same M on every rank -> pending [W * M, D], over both planes."""

    def all_to_all(
        self, name: str, rows: Tensor, sends: Sequence[int], receives: Sequence[int], most: int
    ) -> Pending[Tensor]:
        """Rows [N, D] by destination -> pending rows by source, over both planes; no rank sends another more than
        `most`, which is the same on all ranks."""

    def gather_on_push(self, name: str, x_MD: Tensor) -> Pending[Tensor]:
        """`all_gather` on the push plane alone, for what must not wait behind rows."""


class TwoPlanes:
    """`Planes` over two groups of the same ranks.

    Args:
        push, dma: the groups. streams: where they run.
        push_share: part of the columns on the push plane, rounded down to 16 bytes a row; 0 and 1 use one plane.
    """

    def __init__(self, push: Communicator, dma: Communicator, streams: Streams, push_share: float) -> None:
        self.comms = {"push": push, "dma": dma}
        self.streams, self.push_share = streams, push_share

    def all_gather(self, name: str, x_MD: Tensor) -> Pending[Tensor]:
        return self._both(name, x_MD, _gather)

    def all_to_all(
        self, name: str, rows: Tensor, sends: Sequence[int], receives: Sequence[int], most: int = 0
    ) -> Pending[Tensor]:
        return self._both(name, rows, lambda comm, part: comm.all_to_all(part, sends, receives, async_op=True))

    def gather_on_push(self, name: str, x_MD: Tensor) -> Pending[Tensor]:
        return self.streams.start("push", name, lambda: joined(*_gather(self.comms["push"], x_MD)))

    def all_to_all_on_push(
        self, name: str, rows: Tensor, sends: Sequence[int], receives: Sequence[int]
    ) -> Pending[Tensor]:
        push = self.comms["push"]
        return self.streams.start("push", name, lambda: joined(*push.all_to_all(rows, sends, receives, async_op=True)))

    def _both(
        self, name: str, rows: Tensor, exchange: Callable[[Communicator, Tensor], tuple[Tensor, dist.Work | None]]
    ) -> Pending[Tensor]:
        cut = self.columns_on_push(rows)
        parts = {"dma": rows[:, cut:].contiguous(), "push": rows[:, :cut].contiguous()}

        def post(plane: str) -> Callable[[], Pending[Tensor]]:
            return lambda: joined(*exchange(self.comms[plane], parts[plane]))

        # The plane that is slower to start goes first. Order is the same on every rank.
        pending = {plane: self.streams.start(plane, name, post(plane)) for plane in parts if parts[plane].shape[1]}
        if len(pending) == 1:
            return next(iter(pending.values()))
        return Pending(lambda: torch.cat([pending["push"].wait(), pending["dma"].wait()], dim=1))

    def columns_on_push(self, rows: Tensor) -> int:
        width, step = rows.shape[1], max(ALIGN // rows.element_size(), 1)
        if self.push_share == 1:
            return width
        return min(int(self.push_share * width) // step * step, width)


def _gather(comm: Communicator, x_MD: Tensor) -> tuple[Tensor, dist.Work | None]:
    gathered, work = comm.all_gather(x_MD, async_op=True)
    return gathered.flatten(0, 1), work


def joined(received: Tensor, work: dist.Work | None) -> Pending[Tensor]:
    """A pending tensor from a collective's result and work."""

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return received

    return Pending(finish)
