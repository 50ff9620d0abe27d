"""Windows: memory of every rank that its peers write straight into, and what lies where in it.

A window holds one area a round; `NUM_AREAS` rounds may be under way. A dispatch gives each source rank its own rows in
every area, so a sender needs nobody's counts to know where to write; a way back is packed by the rank that receives it,
which tells its peers where to start. Maps of the areas are the same for every kind of memory.

Legend: W ranks, T tokens that the area has room for (of one rank), K routes a token, B bytes of a row, e experts of a
rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from moeweave.comm.codec import wire_width

NUM_AREAS = 2  # a power of two, so that areas stay in turn when epochs wrap
ALIGN = 128  # bytes
HEADER = 4  # int64s before the counts per expert


class Windows(Protocol):
    """Symmetric memory of a group.

    Attributes:
        rank, size: this rank's place in the group, and the number of its ranks.
        num_bytes: of each rank's window.
    """

    rank: int
    size: int
    num_bytes: int

    def of(self, rank: int) -> Tensor:
        """The window of a rank as uint8 [num_bytes], to be written; this rank's own is what its peers write."""

    def close(self) -> None:
        """Give the memory back. Tensors that were handed out must no longer be used."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all ranks must agree on. Compared across ranks, field by field (`check_equal`).

    Attributes:
        num_experts: over the group.  top_k: K.  width: columns of a row.  row_bytes: B, on the link.
        max_tokens: the fixed room for tokens of a rank, 0 where it grows with the tokens.
    """

    num_experts: int
    top_k: int
    width: int
    row_bytes: int
    max_tokens: int = 0

    @classmethod
    def of(cls, values: Sequence[int]) -> Sizes:
        """The way back of `dataclasses.astuple`."""
        return cls(**dict(zip((field.name for field in fields(cls)), values, strict=True)))


def check_equal(mine: Sizes, others: Sequence[Sizes], what: str) -> None:
    """Raise RuntimeError, naming rank and field, unless every rank's sizes are `mine`; others[r] is rank r's."""
    for rank, sizes in enumerate(others):
        for field, value in asdict(mine).items():
            if getattr(sizes, field) != value:
                raise RuntimeError(
                    f"{what}: {field} is {getattr(sizes, field)} on rank {rank} and {value} here; it must be the same "
                    "on all ranks of the group. Call the layers in the same order with the same sizes."
                )


@dataclass(frozen=True)
class DispatchMap:
    """An area while it takes a dispatch: for each source a header, routes, weights and rows.

    header: int64 [4 + e]: tokens of the source, slots, where the sums and where the rows of its way back start, and
    routes to each expert. routes: int64 [T * K, 2], by expert: slot and route number t * K + k. weights: float64 [T *
    K]. rows: [T, B], by slot.
    """

    sources: int
    tokens: int
    top_k: int
    row_bytes: int
    num_local: int

    @property
    def _starts(self) -> tuple[int, int, int, int]:
        """Of routes, weights, rows, and the end."""
        routes = _align(8 * self.sources * (HEADER + self.num_local))
        weights = routes + _align(16 * self.sources * self.tokens * self.top_k)
        rows = weights + _align(8 * self.sources * self.tokens * self.top_k)
        return routes, weights, rows, rows + _align(self.sources * self.tokens * self.row_bytes)

    @property
    def num_bytes(self) -> int:
        return self._starts[3]

    def headers(self, area: Tensor) -> Tensor:
        """int64 [W, 4 + e]"""
        return _view(area, 0, torch.int64, self.sources, HEADER + self.num_local)

    def routes(self, area: Tensor) -> Tensor:
        """int64 [W, T * K, 2]"""
        return _view(area, self._starts[0], torch.int64, self.sources, self.tokens * self.top_k, 2)

    def weights(self, area: Tensor) -> Tensor:
        """float64 [W, T * K]"""
        return _view(area, self._starts[1], torch.float64, self.sources, self.tokens * self.top_k)

    def rows(self, area: Tensor, dtype: torch.dtype) -> Tensor:
        """[W * T, B / itemsize]"""
        return _view(area, self._starts[2], dtype, self.sources * self.tokens, self.row_bytes // dtype.itemsize)


@dataclass(frozen=True)
class ReturnMap:
    """An area while it takes a way back: rows [num_rows, B], packed by the rank that they come back to."""

    num_rows: int
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        return _align(self.num_rows * self.row_bytes)

    def rows(self, area: Tensor, dtype: torch.dtype) -> Tensor:
        """[num_rows, B / itemsize]"""
        return _view(area, 0, dtype, self.num_rows, self.row_bytes // dtype.itemsize)


def window_bytes(
    *,
    size: int,
    max_tokens: int,
    hidden: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
    combine: str = "prereduced",
    codec: str = "none",
    scale: str = "token",
) -> int:
    """Bytes of each rank's window, before it is allocated: NUM_AREAS times the larger of dispatch and way back.

    Args:
        size: ranks of the group.
        max_tokens: of any rank.
        combine: "prereduced" (a row a token and rank comes back) or "exact" (a row a route).
        codec, scale: format of the rows that dispatch sends, as in `Codec`; the way back is counted uncoded.

    512 tokens of 256 float32 columns, top-4 of 16 experts on 4 ranks: 2 * 2_294_016 = 4_588_032.
    """
    row = wire_width(codec, scale, hidden, dtype)
    there = DispatchMap(size, max_tokens, top_k, row, num_experts // size).num_bytes
    num_back = max_tokens * (top_k if combine == "exact" else min(top_k, size))
    return NUM_AREAS * max(there, ReturnMap(num_back, hidden * dtype.itemsize).num_bytes)


def word_dtype(row_bytes: int) -> torch.dtype:
    """The widest integer that divides a row: what rows are copied as."""
    return torch.int64 if row_bytes % 8 == 0 else torch.uint8


def _view(area: Tensor, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    return area[start : start + num_bytes].view(dtype).view(shape)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN) * ALIGN
