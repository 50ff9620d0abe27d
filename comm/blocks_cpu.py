"""Blocks over memory that CPU ranks of one host share: a plane is an `Exchange`, its windows and its messages.

Legend: W ranks, M rows of a block at most, D columns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moeweave.comm.pending import Pending
from moeweave.comm.rounds import BLOCKS, Call, Exchange, Place
from moeweave.comm.streams import Streams
from moeweave.comm.window_planes import NAMES, PLANES, Blocks
from moeweave.comm.windows import ReturnMap, Sizes

AREAS = 4  # rounds of a plane under way: rows, scales, ids and weights leave before any is read


class HostBlocks:
    """`BlockLink` of a group; made by all its ranks together.

    Args:
        group: CPU ranks of one host. timeout: seconds of a wait; None takes the group's.
    """

    any_size = True

    def __init__(self, group: dist.ProcessGroup, timeout: float | None = None) -> None:
        self.exchanges = {
            plane: Exchange(group, timeout, areas=AREAS, title=f"{plane} plane") for plane in sorted(PLANES)
        }
        self.size = dist.get_world_size(group)

    def start(self, blocks: Blocks, streams: Streams) -> Pending[Tensor]:
        out = blocks.rows.new_empty(sum(blocks.receives), blocks.rows.shape[1])
        pending = [self._post(plane, blocks, out, streams) for plane in blocks.planes]

        def finish() -> Tensor:
            for each in pending:
                each.wait()
            return out

        return Pending(finish)

    def close(self) -> None:
        for exchange in self.exchanges.values():
            exchange.close()

    def _post(self, plane: str, blocks: Blocks, out: Tensor, streams: Streams) -> Pending[Any]:
        rows, room = blocks.rows, _room(blocks.most)
        row_bytes = rows.shape[1] * rows.element_size()
        sizes = Sizes(num_experts=0, top_k=0, width=rows.shape[1], row_bytes=row_bytes, max_tokens=room)

        def area_of(place: Place) -> Tensor:
            return place.map.rows(place.area, rows.dtype)[place.source * room : (place.source + 1) * room]

        def write(peer: int, place: Place) -> None:
            block = blocks.block_for(peer)
            part = blocks.part(plane, block.shape[0])
            area_of(place)[part].copy_(block[part])

        def read(places: list[Place]) -> None:
            for start, num_rows, place in zip(blocks.starts, blocks.receives, places, strict=True):
                part = blocks.part(plane, num_rows)
                out[start : start + num_rows][part].copy_(area_of(place)[part])

        area_map = partial(_area_map, row_bytes)
        call = Call(BLOCKS + NAMES.index(blocks.name), sizes, blocks.most, None, area_map, write, read)
        return streams.start(plane, blocks.name, lambda: self.exchanges[plane].post(call))


def _area_map(row_bytes: int, sources: int, room: int) -> ReturnMap:
    return ReturnMap(sources * room, row_bytes)


def _room(most: int) -> int:
    """Rows that a block has room for: a power of two, so that windows seldom grow."""
    return 1 << max(0, most - 1).bit_length()
