"""Shards that lie in several pieces of the whole tensor, for torch.distributed.checkpoint.

A DTensor is written and read there as one box. Experts' gate and up, packed in one and split over `etp`, are two boxes
on each rank, and experts that a plan has placed one box each: `Pieces` says so, and the two planners find the memory of
each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from moeweave.parallel.hf.boxes import Box, Slots, box_shape, local_pieces, whole_shape


class Pieces:
    """This rank's boxes of a tensor, by torch.distributed.checkpoint's protocol for objects (`_Checkpointable`).

    Attributes:
        by_offset: by the start of a box, the box and the memory of it; `copies` is further memory of the same.
    """

    def __init__(self, shape: torch.Size, pieces: list[tuple[Box, Tensor]]) -> None:
        self.shape = shape
        self.by_offset: dict[torch.Size, tuple[Box, Tensor]] = {}
        self.copies: dict[torch.Size, list[Tensor]] = {}
        for box, view in pieces:
            offset = torch.Size(start for start, _ in box)
            if offset in self.by_offset:
                self.copies.setdefault(offset, []).append(view)
            else:
                self.by_offset[offset] = (box, view)

    def size(self) -> torch.Size:
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=offset, sizes=torch.Size(box_shape(box)))
            for offset, (box, _) in self.by_offset.items()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.by_offset[chunk.offsets][1]),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]


def _in_pieces(state: Mapping[str, Any], slots_of: Mapping[str, Slots]) -> dict[str, Any]:
    """`state` with `Pieces` in place of the shards that need it."""
    found = dict(state)
    for name, tensor in state.items():
        slots = slots_of.get(name)
        if isinstance(tensor, DTensor) and (slots is not None or len(local_pieces(tensor)) > 1):
            found[name] = Pieces(whole_shape(tensor, slots), local_pieces(tensor, slots))
    return found


def _piece(state: Mapping[str, Any], index: MetadataIndex) -> Tensor | None:
    one = state[index.fqn]
    if not isinstance(one, Pieces):
        return None
    assert index.offset is not None
    return one.by_offset[index.offset][1]


class SavePlanner(dcp.DefaultSavePlanner):
    """torch's own, which writes shards in several pieces piece by piece. `slots_of`: by name, of placed experts."""

    def __init__(self, slots_of: Mapping[str, Slots]) -> None:
        super().__init__()
        self.slots_of = slots_of

    # torch looks the arguments up by name, and warns of a planner that does not spell them out.
    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = _in_pieces(self.state_dict, self.slots_of)

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = _piece(self.state_dict, index)
        return super().lookup_object(index) if piece is None else piece.contiguous()


class LoadPlanner(dcp.DefaultLoadPlanner):
    """torch's own, which reads shards in several pieces piece by piece. `slots_of`: by name, of placed experts."""

    def __init__(self, slots_of: Mapping[str, Slots]) -> None:
        super().__init__()
        self.slots_of = slots_of

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = _in_pieces(self.state_dict, self.slots_of)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        piece = _piece(self.state_dict, index)
        return super().lookup_tensor(index) if piece is None else piece

    def copy_replicas(self) -> None:
        """Once all is read: further slots of an expert get what its first slot on this rank has."""
        for pieces in self.state_dict.values():
            for offset, copies in pieces.copies.items() if isinstance(pieces, Pieces) else ():
                for view in copies:
                    view.copy_(pieces.by_offset[offset][1])
