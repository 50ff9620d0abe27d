"""Blocks between NVIDIA GPUs over torch's symmetric memory: no collective, no size that the host must read.

    push   Triton stores (`push_blocks`)        dma   copies by the copy engines, one stream a peer
    both   open, the writes, close (`block_signals`), in order on the plane's stream

Every name has an area of its own in every window, sized by its first exchange and written in place: a result is that
area, valid until this rank's next exchange on the plane, which acknowledges what came before. Rounds are counted on the
device, so a captured pass can be replayed; run it once before it is captured. No GPU has run this.

Legend: W ranks, M rows of a block, D columns, N bytes of a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.engines_cuda import timeout_of
from moeweave.comm.kernel_reports import KernelReports
from moeweave.comm.onesided_launch import set_tensors
from moeweave.comm.pending import Pending
from moeweave.comm.streams import Streams
from moeweave.comm.watchdog import watch
from moeweave.comm.window_planes import NAMES, PLANES, Blocks
from moeweave.comm.windows_cuda import CudaWindow, SymmetricWindow
from moeweave.kernels_ext import block_signals, onesided, push_blocks
from moeweave.kernels_ext.push_blocks import PeerWindows

CHANNELS = [(plane, name) for plane in PLANES for name in NAMES]


@dataclass(frozen=True)
class Area:
    """Memory in every rank's window. Compared across ranks before it is allocated."""

    name: str
    num_bytes: int


class AreaWindow(CudaWindow, Protocol):
    """A window of one area."""

    def of(self, rank: int) -> Tensor:
        """A rank's, as uint8."""


class Signals(Protocol):
    """What orders the writes of all ranks; on the current stream."""

    def open(self, channel: int, read: int) -> None:
        """Acknowledge the channels of which `read` has the bit; wait until this one may be written."""

    def close(self, channel: int, arrived: Tensor) -> None:
        """Publish what was written; wait for all ranks' blocks in `arrived`."""

    def check(self) -> None:
        """Raise what a wait has reported."""


class CudaBlocks:
    """`BlockLink` over areas that `allocate` makes, a collective.

    Args:
        num_sms: multiprocessors of the push plane, 0 for all.
    """

    any_size = False

    def __init__(self, size: int, allocate: Callable[[Area], AreaWindow], signals: Signals, num_sms: int = 0) -> None:
        self.size, self.num_sms = size, num_sms
        self._allocate, self._signals = allocate, signals
        self._windows: dict[str, AreaWindow] = {}
        self._outgrown: list[AreaWindow] = []  # graphs that were captured may hold them
        self._places: dict[tuple[str, str, int, int], PeerWindows] = {}
        self._under_way: set[int] = set()
        self._engines: list[Any] = []

    def start(self, blocks: Blocks, streams: Streams) -> Pending[Tensor]:
        self._signals.check()
        self._refuse(blocks)
        window = self._window_for(blocks)
        arrived = window.of(window.rank)[: self.size * _block_bytes(blocks)]
        channels = [CHANNELS.index((plane, blocks.name)) for plane in blocks.planes]
        pending = []
        for plane, channel in zip(blocks.planes, channels, strict=True):
            read = sum(1 << n for n, (other, _) in enumerate(CHANNELS) if other == plane and n not in self._under_way)
            self._under_way.add(channel)
            go = partial(self._go, plane, channel, read, blocks, self._places_for(plane, blocks, window), arrived)
            pending.append(streams.start(plane, blocks.name, go))

        def finish() -> Tensor:
            for each in pending:
                each.wait()
            self._under_way.difference_update(channels)
            return arrived.view(blocks.rows.dtype).view(-1, blocks.rows.shape[1])

        return Pending(finish)

    def _go(
        self, plane: str, channel: int, read: int, blocks: Blocks, places: PeerWindows, arrived: Tensor
    ) -> Pending[None]:
        x_WN = _by_destination(blocks, self.size)[:, _columns(plane, blocks)]
        self._signals.open(channel, read)
        if plane == "push":
            push_blocks.push(x_WN, places, num_programs=self.num_sms)
        else:
            self._copy(x_WN, places)
        places.windows[places.rank][places.rank].copy_(x_WN[places.rank])
        self._signals.close(channel, arrived)
        return Pending.ready(None)

    def _copy(self, x_WN: Tensor, places: PeerWindows) -> None:
        """Contiguous memory to each peer, on a stream each, so that the engines work side by side."""
        if x_WN.device.type != "cuda":
            push_blocks.push(x_WN, places, impl="reference")
            return
        main = torch.cuda.current_stream(x_WN.device)
        self._engines = self._engines or [torch.cuda.Stream(x_WN.device) for _ in range(self.size - 1)]
        for step, stream in enumerate(self._engines, start=1):
            peer = (places.rank + step) % self.size
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                places.windows[peer][places.rank].copy_(x_WN[peer], non_blocking=True)
        for stream in self._engines:
            main.wait_stream(stream)

    def _refuse(self, blocks: Blocks) -> None:
        for sizes in (blocks.receives, blocks.sends or ()):
            assert set(sizes) <= {blocks.most}, "blocks between GPUs are of one size"
        if any(CHANNELS[channel][1] == blocks.name for channel in self._under_way):
            raise RuntimeError(
                f"exchange ({blocks.name!r}) must be joined before it is started again. Wait for what was started, or "
                "set planes='collectives' where passes overlap."
            )

    def _window_for(self, blocks: Blocks) -> AreaWindow:
        num_bytes, window = self.size * _block_bytes(blocks), self._windows.get(blocks.name)
        if window is None or window.of(window.rank).numel() < num_bytes:
            _refuse_capture(blocks)
            self._outgrown += [] if window is None else [window]
            window = self._windows[blocks.name] = self._allocate(Area(blocks.name, num_bytes))
            self._places = {key: places for key, places in self._places.items() if key[1] != blocks.name}
        return window

    def _places_for(self, plane: str, blocks: Blocks, window: AreaWindow) -> PeerWindows:
        """Where a plane's part of this rank's block lies in every window."""
        columns, num_bytes = _columns(plane, blocks), _block_bytes(blocks)
        key = plane, blocks.name, num_bytes, columns.start
        if key not in self._places:
            _refuse_capture(blocks)
            windows = [window.of(rank)[: self.size * num_bytes].view(self.size, -1) for rank in range(self.size)]
            parts = [whole_WN[:, columns] for whole_WN in windows]
            self._places[key] = PeerWindows(parts, window.peers + columns.start, window.rank)
        return self._places[key]


def _block_bytes(blocks: Blocks) -> int:
    return blocks.most * blocks.rows.shape[1] * blocks.rows.element_size()


def _columns(plane: str, blocks: Blocks) -> slice:
    """A plane's part of a block, in bytes."""
    part, row_bytes = blocks.part(plane, blocks.most), blocks.rows.shape[1] * blocks.rows.element_size()
    return slice(part.start * row_bytes, part.stop * row_bytes)


def _by_destination(blocks: Blocks, size: int) -> Tensor:
    """uint8 [W, N], one row of memory for all where all get the same."""
    words = blocks.rows.view(torch.uint8)
    return words.view(1, -1).expand(size, -1) if blocks.sends is None else words.view(size, -1)


def _refuse_capture(blocks: Blocks) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"windows of exchange ({blocks.name!r}) must exist before a graph is captured. Run the pass once before, "
            "on all ranks, with the same sizes."
        )


class DeviceSignals(KernelReports):
    """`Signals` in a window of their own, by the kernels of `block_signals`.

    Args:
        window: of `num_bytes(size)`. timeout: seconds that one wait may take.
        launch: runs a kernel of `block_signals`, one block, on the current stream.
    """

    def __init__(self, window: CudaWindow, timeout: float, launch: Callable[[str, Any], None]) -> None:
        super().__init__(window, timeout)
        self._run = launch
        self._state = torch.zeros(block_signals.STATE_WORDS, dtype=torch.int32, device=window.peers.device)
        self._base = onesided.params_type()()
        set_tensors(self._base, peers=window.peers, state=self._state, report=self.report)
        cells = 8 * len(CHANNELS) * window.size
        values = dict(window=int(window.peers[window.rank]), deadline=int(timeout * 1e9), rank=window.rank)
        for name, value in {**values, "world": window.size, "at_acks": 128, "at_cells": 128 + cells}.items():
            setattr(self._base, name, value)

    @staticmethod
    def num_bytes(size: int) -> int:
        """The abort cell, then acknowledgements and arrivals [channels, W]."""
        return 128 + 2 * 8 * len(CHANNELS) * size

    def open(self, channel: int, read: int) -> None:
        self._launch("moeweave_blocks_open", kind=channel, flags=read)

    def close(self, channel: int, arrived: Tensor) -> None:
        self._launch("moeweave_blocks_close", kind=channel, rows=arrived.data_ptr(), capacity=arrived.numel())

    def names_of(self, kind: int) -> tuple[str, str]:
        plane, name = CHANNELS[kind]
        return f"{plane} plane", name

    def _launch(self, kernel: str, **fields: int) -> None:
        params = type(self._base).from_buffer_copy(self._base)
        for name, value in fields.items():
            setattr(params, name, value)
        self._run(kernel, params)


def signals_of(window: CudaWindow, timeout: float) -> DeviceSignals:
    """Signals in a window on a GPU, their kernels loaded."""
    module = block_signals.kernels(window.peers.device.index or 0)
    return DeviceSignals(
        window, timeout, lambda kernel, params: module.launch(kernel, 1, block_signals.THREADS, params)
    )


def open_blocks(group: dist.ProcessGroup, num_sms: int = 0) -> CudaBlocks:
    """The link of a group of GPUs that reach each other; a collective."""
    device = torch.device("cuda", torch.cuda.current_device())
    held = weakref.ref(group)  # the link is kept by its group

    def allocate(area: Area) -> SymmetricWindow:
        found = held()
        assert found is not None, "a group outlives its link"
        return SymmetricWindow(found, area, device)

    size = dist.get_world_size(group)
    signals = signals_of(allocate(Area("signals", DeviceSignals.num_bytes(size))), timeout_of(group))
    watch(signals)
    return CudaBlocks(size, allocate, signals, num_sms)
