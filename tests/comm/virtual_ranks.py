"""Several ranks of the CUDA engine in one process on one GPU: a window and a stream each, blocks few enough to fit.

Kernels of all ranks are resident at once, so they wait for each other as ranks on several GPUs do; only the link is
missing. On one GPU this is how the protocol is tested; ranks of their own processes are in test_onesided_ranks.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moeweave.comm.onesided_cuda import CudaEngine
from moeweave.comm.onesided_launch import Budget
from moeweave.comm.onesided_runtime import CudaRuntime
from moeweave.comm.windows_cuda import WindowMap
from moeweave.kernels_ext.onesided import Variants

# Streams that share a hardware queue would run one after the other, and the first would wait for the second for ever.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

T = TypeVar("T")


@dataclass(frozen=True)
class VirtualWindow:
    rank: int
    size: int
    peers: Tensor
    memory: Tensor


def virtual_engines(
    window_map: WindowMap, *, timeout: float = 10.0, budget: Budget | None = None, variants: Variants = ()
) -> list[CudaEngine]:
    device = torch.device("cuda", 0)
    windows = [torch.zeros(window_map.num_bytes, dtype=torch.uint8, device=device) for _ in range(window_map.size)]
    peers = torch.tensor([window.data_ptr() for window in windows], dtype=torch.int64, device=device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    # Two blocks a multiprocessor are resident.
    budget = budget or Budget(sms // window_map.size, sms // window_map.size)
    _load_torch_kernels(device)
    return [
        CudaEngine(
            VirtualWindow(rank, window_map.size, peers, window), window_map, timeout=timeout, budget=budget,
            runtime=CudaRuntime(device, variants),
        )
        for rank, window in enumerate(windows)
    ]  # fmt: skip


def _load_torch_kernels(device: torch.device) -> None:
    """What engines call beside their own kernels, before one of those spins: loading may wait for the device."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64):
        torch.zeros(8, dtype=dtype, device=device).zero_().add_(1).to(torch.float32)


class Streams:
    """Runs a function of the rank on every rank's stream; the current stream comes before and after."""

    def __init__(self, size: int) -> None:
        self.streams = [torch.cuda.Stream() for _ in range(size)]

    def run(self, call: Callable[[int], T], ranks: Sequence[int] | None = None) -> list[T]:
        """Of all ranks, or of these."""
        main, results = torch.cuda.current_stream(), []
        used = range(len(self.streams)) if ranks is None else ranks
        for rank in used:
            self.streams[rank].wait_stream(main)
            with torch.cuda.stream(self.streams[rank]):
                results.append(call(rank))
        for rank in used:
            main.wait_stream(self.streams[rank])
        return results

    def run_waiting(self, call: Callable[[int], T]) -> list[T]:
        """Calls that wait for the device, and so for each other."""

        def on_stream(rank: int) -> T:
            with torch.cuda.stream(self.streams[rank]):
                return call(rank)

        torch.cuda.synchronize()
        with ThreadPoolExecutor(len(self.streams)) as pool:
            return list(pool.map(on_stream, range(len(self.streams))))
