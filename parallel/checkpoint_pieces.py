"""Shards that lie in several pieces of the whole tensor, for torch.distributed.checkpoint.

A DTensor is written and read there as one box. Experts' gate and up, packed in one and split over `etp`, are two boxes
on each rank: `Pieces` says so, and the two planners find the memory of each.
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

from moeweave.parallel.hf.boxes import Box, box_shape, local_pieces


class Pieces:
    """This rank's boxes of a tensor, by torch.distributed.checkpoint's protocol for objects (`_Checkpointable`)."""

    def __init__(self, tensor: Tensor, pieces: list[tuple[Box, Tensor]]) -> None:
        self.tensor = tensor
        self.by_offset = {torch.Size(start for start, _ in box): (box, view) for box, view in pieces}

    def size(self) -> torch.Size:
        return self.tensor.size()

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


def _in_pieces(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with `Pieces` in place of the shards that need it."""
    found = dict(state)
    for name, tensor in state.items():
        if isinstance(tensor, DTensor) and len(pieces := local_pieces(tensor)) > 1:
            found[name] = Pieces(tensor, pieces)
    return found


def _piece(state: Mapping[str, Any], index: MetadataIndex) -> Tensor | None:
    one = state[index.fqn]
    if not isinstance(one, Pieces):
        return None
    assert index.offset is not None
    return one.by_offset[index.offset][1]


class SavePlanner(dcp.DefaultSavePlanner):
    """torch's own, which writes shards in several pieces piece by piece."""

    # torch looks the arguments up by name, and warns of a planner that does not spell them out.
    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = _in_pieces(self.state_dict)

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = _piece(self.state_dict, index)
        return super().lookup_object(index) if piece is None else piece.contiguous()


class LoadPlanner(dcp.DefaultLoadPlanner):
    """torch's own, which reads shards in several pieces piece by piece."""

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = _in_pieces(self.state_dict)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        piece = _piece(self.state_dict, index)
        return super().lookup_tensor(index) if piece is None else piece
