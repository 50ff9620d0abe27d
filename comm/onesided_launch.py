"""How the one-sided kernels are launched: what every launch is told, how many blocks it has, and what it reported.

Nothing here waits for the device: failures and drops are read from pinned memory that kernels write.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeweave.comm.kernel_reports import KernelReports
from moeweave.comm.onesided_runtime import Compiled, CudaRuntime, Runtime
from moeweave.comm.windows_cuda import CudaWindow, WindowMap
from moeweave.kernels_ext import onesided


@dataclass(frozen=True)
class Budget:
    """Blocks, two to a multiprocessor at most.

    Attributes:
        senders: those that hold the link.
        receivers: those that expand or sum what arrives.
    """

    senders: int
    receivers: int

    @classmethod
    def of(cls, device: torch.device, num_sms: int | None = None, max_tokens: int = 0) -> Budget:
        """All multiprocessors to expand and sum, and for the link `num_sms` of them.

        None: all while each has at most one of `max_tokens` tokens, else three in four. On 2 H100, v3-prefill, 96 of
        132 send as fast as any number or faster (dispatch 355 us, with all 381; combine 365 and 365;
        `tests/results/onesided_2gpu.json`).
        """
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        senders = (sms if max_tokens <= sms else sms * 3 // 4) if num_sms is None else num_sms
        if not 1 <= senders <= sms:
            raise ValueError(
                f"num_sms ({num_sms}) must be from 1 to {sms}, the multiprocessors of {device}. Change it."
            )
        return cls(senders, sms)


class Launcher(KernelReports):
    """Launches over one window, in order.

    Args:
        window: of this rank; every rank of the group has one of the same map.
        window_map: its layout.
        timeout: seconds that one wait of a kernel may take.
        budget: blocks of each launch. Engines whose launches overlap must fit the device together.
        runtime: what the kernels run on; None is the window's CUDA device.

    Attributes:
        window_map, budget: as given.
        device: of the window.
        state: int32 on the device, the kernels' counters.
        runtime: as given, or the device's.
    """

    def __init__(
        self, window: CudaWindow, window_map: WindowMap, timeout: float, budget: Budget | None,
        runtime: Runtime | None = None,
    ) -> None:  # fmt: skip
        super().__init__(window, timeout)
        self.window_map, self.device = window_map, window.peers.device
        self.budget = budget or Budget.of(self.device)
        self.state = torch.zeros(onesided.STATE_WORDS, dtype=torch.int32, device=self.device)
        self.runtime = runtime or CudaRuntime(self.device)
        self._base = self._fixed_params()

    def params(self, kind: str) -> Any:
        """What every operation of a kind is told; the caller adds its tensors and sizes."""
        params, starts = type(self._base).from_buffer_copy(self._base), self.window_map.starts
        params.kind = onesided.OPERATIONS.index(kind)
        for part in ("flags", "cells", "counts", "rows"):
            if f"{kind}_{part}" in starts:
                setattr(params, f"at_{part}", starts[f"{kind}_{part}"])
        return params

    def share_rows(self, kernel: str, params: Any, sent: int, received: int) -> None:
        """Warps that share a row: more than one where there are more warps than rows.

        A sending block has `sent` rows, all receiving ones `received`; a part is no shorter than 512 bytes, and the
        parts of all slots are counted in 31 bits.
        """
        slots = self.window_map.size * (self.window_map.max_tokens + onesided.MAX_CHUNK)
        warps, most = self.runtime.threads[kernel] // 32, max(min(params.row_stride // 512, 2**31 // slots - 1), 1)
        params.sender_parts = divisor_below(warps, min(warps // max(sent, 1), most))
        params.receiver_parts = divisor_below(warps, min(self.budget.receivers * warps // max(received, 1), most))

    def keep_sums(self, kernel: str, params: Any, units: int) -> None:
        """Room in shared memory for the rows of `units` 16 bytes that a sending block sums, if they fit.

        Each warp keeps its part of one; with more warps a row, fewer rows are kept.
        """
        warps = self.runtime.threads[kernel] // 32
        for parts in (each for each in range(params.sender_parts, warps + 1) if warps % each == 0):
            stash = 16 * 32 * ceil_div(ceil_div(units, parts), 32)
            if stash * warps <= onesided.KEPT_BYTES:
                params.sender_parts, params.stash = parts, stash
                return

    def launch(
        self, kernel: str, params: Any, dtype: torch.dtype, format: str, scale: str, grid: int | None = None
    ) -> None:
        """Run a kernel after what was launched before; raises what an earlier launch reported."""
        self.check()
        grid = self.budget.senders + self.budget.receivers if grid is None else grid
        shared_bytes = max(8 * self.window_map.num_experts, params.stash * self.runtime.threads[kernel] // 32)
        self.runtime.launch(kernel, grid, params, shared_bytes, Compiled(dtype, format, scale, self.window_map.top_k))

    @property
    def num_dropped(self) -> int:
        """Routes that found no room here, over all dispatches that have ended. No synchronisation."""
        return int(self.report[8:].sum())

    @property
    def num_planned(self) -> int:
        """Rows that the last plan that has ended found."""
        return int(self.report[6])

    def names_of(self, kind: int) -> tuple[str, str]:
        return "onesided", onesided.OPERATIONS[kind]

    def _fixed_params(self) -> Any:
        params, window, room = onesided.params_type()(), self.window, self.window_map
        set_tensors(params, peers=window.peers, state=self.state, report=self.report)
        # id * magic >> 32 is id / num_local for ids below 65536; 0 stands for 1 expert a rank.
        magic = 0 if room.num_local == 1 else ceil_div(1 << 32, room.num_local)
        values = dict(
            window=int(window.peers[window.rank]), deadline=int(self.timeout * 1e9), at_abort=room.starts["abort"],
            at_acks=room.starts["acks"],
            at_meta=room.starts["meta"], at_dots=room.starts["dots"], meta_stride=room.meta_bytes, rank=window.rank,
            world=window.size, num_experts=room.num_experts, num_local=room.num_local,
            magic=ctypes.c_int32(magic).value,
            max_tokens=room.max_tokens, chunk=room.chunk, num_chunks=room.num_chunks, align=1,
            senders=self.budget.senders, receivers=self.budget.receivers, sender_parts=1, receiver_parts=1,
        )  # fmt: skip
        for name, value in values.items():
            setattr(params, name, value)
        return params


def set_tensors(params: Any, **tensors: Tensor) -> None:
    """Addresses of tensors into the fields of these names."""
    for name, tensor in tensors.items():
        setattr(params, name, tensor.data_ptr())


def ceil_div(number: int, step: int) -> int:
    return -(-number // step)


def divisor_below(number: int, most: int) -> int:
    """Largest divisor of `number` that is at most `most`, or 1."""
    return max((d for d in range(1, number + 1) if number % d == 0 and d <= most), default=1)
