"""The signals of blocks, their own source, run on a CPU: ranks are threads, copies plain, waits and deadlines real."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.comm.blocks_cuda import CHANNELS, Area, CudaBlocks, DeviceSignals
from moeweave.comm.kernel_reports import OneSidedError
from moeweave.comm.streams import make_streams
from moeweave.comm.window_planes import WindowPlanes
from moeweave.kernels_ext import block_signals, onesided
from thread_blocks import ThreadWindow, World

cuda_on_cpu = pytest.importorskip("cuda_on_cpu", reason="needs the emulation of CUDA threads")
pytestmark = cuda_on_cpu.needs_gxx
THREADS = 64


@functools.cache
def kernels() -> Any:
    text = block_signals.source(tuple(name for name in onesided.SOURCES if name != "ptx.cu"))
    # The kernels have no shared memory of their own, and the emulation looks for some.
    return cuda_on_cpu.Module(text + "__attribute__((used)) __shared__ int nothing;\n", block_signals.KERNELS, {})


class Ranks:
    """Links of `size` ranks over the emulated kernels."""

    def __init__(self, size: int, timeout: float = 30.0, seed: int = 0) -> None:
        self.machine, self.world, self.size = cuda_on_cpu.Machine(seed), World(size), size
        self.memory = [torch.zeros(DeviceSignals.num_bytes(size), dtype=torch.uint8) for _ in range(size)]
        self.signals = [self._signals(rank, timeout) for rank in range(size)]
        self.links = [
            CudaBlocks(size, functools.partial(self._window, rank), self.signals[rank]) for rank in range(size)
        ]

    def _window(self, rank: int, area: Area) -> ThreadWindow:
        return ThreadWindow(self.world, rank, area)

    def _signals(self, rank: int, timeout: float) -> DeviceSignals:
        def launch(kernel: str, params: Any) -> None:
            self.machine.launch(rank, kernels(), kernel, 1, THREADS, bytes(params), 0)

        window = ThreadWindow(self.world, rank, Area("signals", 1))
        window.peers = torch.tensor([memory.data_ptr() for memory in self.memory])
        return DeviceSignals(window, timeout, launch)

    def planes(self, rank: int, share: float) -> WindowPlanes:
        return WindowPlanes(self.links[rank], make_streams("cpu", overlap=False), share)


def value(number: int, source: int, target: int) -> Tensor:
    return torch.full((4, 8), float(100 * number + 10 * source + target))


@pytest.mark.parametrize("size, share", [(1, 0.5), (2, 0.0), (3, 0.3), (3, 1.0)])
def test_what_comes(size: int, share: float) -> None:
    ranks = Ranks(size, seed=size)

    def task(rank: int) -> bool:
        planes, right = ranks.planes(rank, share), True
        for number in range(5):
            arriving = (
                planes.all_gather("rows", value(number, rank, 0)),
                planes.gather_on_push("ids", value(number, rank, 1)),
            )
            for pending, target in zip(arriving, (0, 1), strict=True):
                right &= torch.equal(pending.wait(), torch.cat([value(number, r, target) for r in range(size)]))
            rows = torch.cat([value(number, rank, target) for target in range(size)])
            back = planes.all_to_all("results", rows, [4] * size, [4] * size, 4).wait()
            right &= torch.equal(back, torch.cat([value(number, source, rank) for source in range(size)]))
        ranks.signals[rank].check()
        return right

    assert ranks.machine.run(task, range(size)) == [True] * size


def test_rounds_wrap() -> None:
    ranks, channel = Ranks(2), CHANNELS.index(("push", "rows"))
    for signals, memory in zip(ranks.signals, ranks.memory, strict=True):
        signals._state[onesided.EPOCHS + channel] = -2
        first = 128 + 8 * 2 * channel
        memory[first : first + 16].view(torch.int64).fill_(-2 << 32)

    def task(rank: int) -> list[float]:
        planes = ranks.planes(rank, 1.0)
        return [float(planes.all_gather("rows", value(n, rank, 0)).wait().sum()) for n in range(5)]

    assert ranks.machine.run(task, range(2)) == [[float(32 * (200 * n + 10)) for n in range(5)]] * 2
    assert int(ranks.signals[0]._state[onesided.EPOCHS + channel]) == 3


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_stays_away_is_named_and_what_it_owed_is_nan(size: int) -> None:
    ranks = Ranks(size, timeout=0.5)

    def task(rank: int) -> str:
        planes = ranks.planes(rank, 1.0)
        planes.all_gather("rows", value(1, rank, 0)).wait()
        if rank == size - 1:
            return ""
        came, ids = planes.all_gather("rows", value(2, rank, 0)).wait(), torch.zeros(2, 2, dtype=torch.int64)
        assert bool(came.isnan().all())
        with pytest.raises(OneSidedError) as error:
            planes.gather_on_push("ids", ids)
        return str(error.value)

    told = ranks.machine.run(task, range(size))
    for rank, text in enumerate(told[:-1]):
        assert (
            f"push plane, rank {rank} of {size}: rows waited 0.5 s for the acknowledgement of the round before" in text
        )
        assert f"of rank {size - 1}" in text


def test_what_comes_after_a_failure_is_nan_without_another_wait() -> None:
    ranks = Ranks(2, timeout=0.5)

    def task(rank: int) -> bool:
        if rank == 1:
            return True
        came = ranks.planes(rank, 1.0).all_gather("rows", value(1, rank, 0)).wait()
        ranks.signals[rank].check = lambda: None  # type: ignore[method-assign]
        ids = ranks.planes(rank, 1.0).gather_on_push("ids", torch.zeros(2, 2, dtype=torch.int64)).wait()
        return bool(came.isnan().all()) and bool((ids == -1).all())

    assert ranks.machine.run(task, range(2)) == [True, True]
    error = ranks.signals[0].error()
    assert error is not None and "rows waited 0.5 s for the rows of rank 1" in str(error)
