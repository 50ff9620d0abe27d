"""Several ranks of the CUDA engine without a GPU: windows in plain memory, kernels run by cuda_on_cpu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from cuda_on_cpu import CpuRuntime, Machine
from moeweave.comm.onesided_cuda import CudaEngine
from moeweave.comm.onesided_launch import Budget
from moeweave.comm.windows_cuda import WindowMap
from moeweave.kernels_ext.onesided import Variants
from virtual_ranks import VirtualWindow

T = TypeVar("T")


class EmulatedRanks:
    """Runs a function of the rank on every rank, as `virtual_ranks.Streams` does."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine, self.size = machine, size

    def run(self, call: Callable[[int], T], ranks: Sequence[int] | None = None) -> list[T]:
        return self.machine.run(call, range(self.size) if ranks is None else ranks)

    run_waiting = run


def emulated_engines(
    window_map: WindowMap,
    *,
    timeout: float = 10.0,
    budget: Budget | None = None,
    threads: int = 64,
    seed: int = 0,
    text: str | None = None,
    variants: Variants = (),
) -> tuple[list[CudaEngine], EmulatedRanks]:
    machine, size = Machine(seed), window_map.size
    windows = [torch.zeros(window_map.num_bytes, dtype=torch.uint8) for _ in range(size)]
    peers = torch.tensor([window.data_ptr() for window in windows], dtype=torch.int64)
    engines = [
        CudaEngine(
            VirtualWindow(rank, size, peers, window), window_map, timeout=timeout, budget=budget or Budget(2, 2),
            runtime=CpuRuntime(machine, rank, threads, text, variants),
        )
        for rank, window in enumerate(windows)
    ]  # fmt: skip
    return engines, EmulatedRanks(machine, size)
