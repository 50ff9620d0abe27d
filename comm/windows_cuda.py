"""Windows on CUDA: memory of every rank that the others' kernels store into, by torch's symmetric memory.

A window is sized once, for a number of tokens; its size is told before anything is allocated (`WindowMap.num_bytes`).
What lies where is the same on all ranks; kernels_ext/onesided/csrc/link.cu says what each part is for. Dispatch,
combine and plan (an exchange of counts alone) have cells of their own: they need no order among themselves.

Legend: W ranks, M tokens of a rank that there is room for, K routes a token, e experts of a rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.kernels_ext import onesided

MOST_CHUNKS = 256  # units of publication of a rank, as long as a chunk stays below onesided.MAX_CHUNK tokens
MOST_PLACES = 1 << 22  # routes of a rank to one expert, as a pair on the link counts them
MOST_LOCAL = 1 << 10  # experts of a rank, likewise


class CudaWindow(Protocol):
    """Symmetric memory of a group, all zeros when it is handed out.

    Attributes:
        rank, size: this rank's place in the group, and the number of its ranks.
        peers: int64 [W] on the device, the address of every rank's window.
    """

    rank: int
    size: int
    peers: Tensor


@dataclass(frozen=True, kw_only=True)
class WindowMap:
    """What lies where in every rank's window.

    Attributes:
        size: ranks.  num_experts: over the group, a multiple of `size`.  top_k: K.
        max_tokens: M, of any rank.
        row_bytes, back_bytes: of a row on its way to the experts and back, the widest of all formats in use.
        exact: room for a row a route on the way back, in place of a row a token and rank.
    """

    size: int
    num_experts: int
    top_k: int
    max_tokens: int
    row_bytes: int
    back_bytes: int
    exact: bool = False

    def __post_init__(self) -> None:
        if self.num_experts % self.size:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be a multiple of the group's size ({self.size}). "
                "Change num_experts or the ep size."
            )
        limits = [
            ("the group's size", self.size, onesided.MAX_RANKS),
            ("top_k", self.top_k, onesided.MAX_TOP_K),
            ("experts of a rank", self.num_local, MOST_LOCAL),
            ("max_tokens * top_k", self.max_tokens * self.top_k, MOST_PLACES),
        ]
        for name, value, most in limits:
            if not 1 <= value <= most:
                raise ValueError(f"{name} ({value}) must be from 1 to {most}. Use dispatcher='alltoall'.")
        for name, value in (("row_bytes", self.row_bytes), ("back_bytes", self.back_bytes)):
            if value <= 0 or value % 16:
                raise ValueError(f"{name} ({value}) must be a multiple of 16. Use another hidden size, or 'alltoall'.")

    @property
    def num_local(self) -> int:
        return self.num_experts // self.size

    @property
    def chunk(self) -> int:
        """Tokens that are published together."""
        return min(max(-(-self.max_tokens // MOST_CHUNKS), 1), onesided.MAX_CHUNK)

    @property
    def num_chunks(self) -> int:
        return -(-self.max_tokens // self.chunk)

    @property
    def meta_bytes(self) -> int:
        """A pair and a weight a route, and the token."""
        return _align(8 * self.top_k + 4, 16)

    @cached_property
    def starts(self) -> dict[str, int]:
        """Offset of every part, and of the "end"."""
        rows = self.size * self.max_tokens
        back = self.max_tokens * self.top_k if self.exact else rows
        parts = [
            ("abort", 8),
            ("acks", 8 * self.size * len(onesided.OPERATIONS)),
            *((f"{kind}_flags", 8 * self.size) for kind in onesided.OPERATIONS),
            *((f"{kind}_cells", 8 * self.size * self.num_chunks) for kind in onesided.OPERATIONS[:2]),
            ("dispatch_counts", 4 * self.size * self.num_local),
            ("plan_counts", 4 * self.size * self.num_local),
            ("meta", rows * self.meta_bytes),
            ("dots", 4 * rows * self.top_k),
            ("dispatch_rows", rows * self.row_bytes),
            ("combine_rows", back * self.back_bytes),
        ]
        starts, end = {}, 0
        for name, num_bytes in parts:
            starts[name] = end
            end += _align(num_bytes, 128)
        return {**starts, "end": end}

    @property
    def num_bytes(self) -> int:
        """Of each rank's window. 4096 tokens of 7168 bf16, top-8 of 256 experts on 4 ranks: 472 MB."""
        return self.starts["end"]


class Contents(Protocol):
    """What a window is for, a frozen dataclass."""

    @property
    def num_bytes(self) -> int: ...


class SymmetricWindow:
    """A window by torch.distributed._symmetric_memory. Made by all ranks of `group` together, freed with its last user.

    Args:
        group: a group with a CUDA backend, of one scale-up domain.
        window_map: compared across ranks before anything is allocated.

    Raises:
        RuntimeError: the ranks ask for different windows, or cannot map each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, window_map: Contents, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        _check_equal(group, window_map)
        self._memory = symmetric.empty(window_map.num_bytes, dtype=torch.uint8, device=device)
        self._memory.zero_()
        self._handle = symmetric.rendezvous(self._memory, group)
        self.peers = torch.tensor(list(self._handle.buffer_ptrs), dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody writes before every window is zeros

    def of(self, rank: int) -> Tensor:
        """A rank's memory as uint8."""
        return self._handle.get_buffer(rank, (self._memory.numel(),), torch.uint8)


def _check_equal(group: dist.ProcessGroup, window_map: Contents) -> None:
    """A fingerprint of sizes across ranks: kernels of different layouts would write over each other."""
    others: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(others, window_map, group=group)
    for rank, other in enumerate(others):
        for field, value in asdict(cast(Any, window_map)).items():
            theirs = getattr(other, field)
            if theirs != value:
                raise RuntimeError(
                    f"window's {field} is {theirs} on rank {rank} and {value} here; it must be the same on all ranks "
                    "of the group. Make the dispatchers in the same order with the same sizes."
                )


def _align(size: int, step: int) -> int:
    return -(-size // step) * step
