"""The two planes over windows: rows go straight into the peers' memory, in blocks whose room every rank knows.

    push   device cores store: scales, ids, weights, and the first part of every block of rows
    dma    copy engines copy the rest of every block (on a CPU, a helper thread)

An exchange is split by rows, so both planes move contiguous memory and the parts meet where they belong, uncopied.
Peers write where this rank has acknowledged what came before. No sizes are exchanged, so the host need not wait, and
copy engines take no cores. The memory behind it is a `BlockLink`: `blocks_cpu`, `blocks_cuda`.

Example, 2 ranks, blocks of 10 rows, push_share 0.25: rows 0 and 1 of each block go on push, 2 to 9 on dma.

Legend: W ranks, M rows of a block at most, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from moeweave.comm.pending import Pending
from moeweave.comm.streams import Streams

PLANES = ("dma", "push")  # the one that is slower to start goes first
NAMES = ("rows", "scales", "ids", "weights", "results", "gradients of results", "gradients of rows")


@dataclass(frozen=True)
class Blocks:
    """One exchange as this rank sees it.

    Attributes:
        name: one of NAMES.
        rows: [N, D], contiguous, without a gradient: by destination, or with `sends` None for every rank.
        sends, receives: rows to and from each rank.
        most: M, the same on all ranks.
        push_share: part of each block on the push plane.
    """

    name: str
    rows: Tensor
    sends: Sequence[int] | None
    receives: Sequence[int]
    most: int
    push_share: float

    @property
    def planes(self) -> list[str]:
        """Those that carry something, by what every rank knows alike."""
        unused = {0.0: "push", 1.0: "dma"}.get(self.push_share)
        return [plane for plane in PLANES if plane != unused]

    def block_for(self, rank: int) -> Tensor:
        """The rows that go to a rank."""
        if self.sends is None:
            return self.rows
        start = sum(self.sends[:rank])
        return self.rows[start : start + self.sends[rank]]

    def part(self, plane: str, num_rows: int) -> slice:
        """Rows of a block of `num_rows` that a plane carries."""
        cut = int(self.push_share * num_rows)
        return slice(0, cut) if plane == "push" else slice(cut, num_rows)

    @property
    def starts(self) -> list[int]:
        """Where each source's block starts in the result."""
        return [0, *accumulate(self.receives)][:-1]


class BlockLink(Protocol):
    """Windows of a group, and the signals in them. Kinds of memory differ in this alone.

    Attributes:
        size: W.
        any_size: blocks may be of other sizes in every exchange; else each name has the sizes of its first.
    """

    size: int
    any_size: bool

    def start(self, blocks: Blocks, streams: Streams) -> Pending[Tensor]:
        """Post an exchange on its planes -> pending rows by source [sum(receives), D].

        Errors of a dead or late peer name it, the exchange and what was waited for.
        """


class WindowPlanes:
    """`two_planes.Planes` over a `BlockLink`.

    Args:
        link: shared by all schedules over the same groups. streams: where exchanges run.
        push_share: part of the rows of every block on the push plane; 0 and 1 use one plane.
    """

    def __init__(self, link: BlockLink, streams: Streams, push_share: float) -> None:
        self.link, self.streams, self.push_share = link, streams, push_share

    def all_gather(self, name: str, x_MD: Tensor) -> Pending[Tensor]:
        return self._gather(name, x_MD, self.push_share)

    def gather_on_push(self, name: str, x_MD: Tensor) -> Pending[Tensor]:
        return self._gather(name, x_MD, 1.0)

    def all_to_all(
        self, name: str, rows: Tensor, sends: Sequence[int], receives: Sequence[int], most: int
    ) -> Pending[Tensor]:
        return self._start(Blocks(name, _plain(rows), sends, receives, most, float(self.push_share)))

    def _gather(self, name: str, x_MD: Tensor, share: float) -> Pending[Tensor]:
        num_rows = x_MD.shape[0]
        receives = [num_rows] * self.link.size
        return self._start(Blocks(name, _plain(x_MD), None, receives, num_rows, float(share)))

    def _start(self, blocks: Blocks) -> Pending[Tensor]:
        return self.link.start(blocks, self.streams)


def _plain(rows: Tensor) -> Tensor:
    return rows.detach().contiguous()
