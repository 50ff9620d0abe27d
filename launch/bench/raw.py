"""`op=raw`: contiguous blocks to every other rank by writing into its memory: what the links give without a collective.

    push    this device's cores write (Triton on CUDA, the calling thread on a CPU)
    dma     copy engines write (on a CPU, a helper thread)
    torch   the same blocks by torch's all-to-all, to compare with

On CUDA the memory is torch's symmetric memory, on a CPU regions that the ranks of one host share.

The time includes the barrier after which every block is known to have arrived. `size` is what leaves a rank, rounded
up to blocks of a multiple of 16 bytes.
Legend: W ranks, N bytes of a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.peers import FIRST_KIND, Peers
from moeweave.comm.windows_cpu import create_memory, map_memory
from moeweave.kernels_ext import push_blocks
from moeweave.launch.bench import collectives, shapes
from moeweave.launch.bench.case import Case, Work, backend_factory
from moeweave.launch.schema import BenchConfig, ConfigError
from moeweave.parallel.mesh import Mesh

SECONDS = 120.0  # that a rank waits for its peers


class Plane(Protocol):
    """What a backend for `raw` offers.

    Attributes:
        window: uint8 [W, N] of this rank; row s is what rank s sends here.
    """

    window: Tensor

    def exchange(self, x_WN: Tensor) -> None:
        """Row p of x [W, N] (uint8) to rank p; when it is done on the device, all blocks of others are in `window`."""


class CudaPlane:
    """Symmetric memory of torch; `push` by its kernel or by a copy engine for each peer."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, config: BenchConfig, engine: bool) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        size, rank = group.size(), group.rank()
        device = torch.device("cuda", torch.cuda.current_device())
        self.window = symmetric.empty(size, num_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self.window, group)
        views = [self._handle.get_buffer(peer, (size, num_bytes), torch.uint8) for peer in range(size)]
        self._peers = push_blocks.PeerWindows.of(views, rank)
        self._programs = config.programs or 0
        self._streams = [torch.cuda.Stream(device) for _ in range(size - 1)] if engine else []

    def exchange(self, x_WN: Tensor) -> None:
        if self._streams:
            self._copy(x_WN)
        else:
            push_blocks.push(x_WN, self._peers, num_programs=self._programs, impl="triton")
        self._handle.barrier(channel=0)

    def _copy(self, x_WN: Tensor) -> None:
        """One copy a peer, each on a stream of its own, so that the engines work side by side."""
        main, size, rank = torch.cuda.current_stream(), len(self._peers.windows), self._peers.rank
        for step, stream in enumerate(self._streams, start=1):
            peer = (rank + step) % size
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                self._peers.windows[peer][rank].copy_(x_WN[peer], non_blocking=True)
        for stream in self._streams:
            main.wait_stream(stream)


class CpuPlane:
    """Regions that the ranks of one host share; a message to each peer says that its block is there."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, helper: bool) -> None:
        self._peers, self._size = Peers(group, timeout=SECONDS), (group.size(), num_bytes)
        fd, memory = create_memory(group.size() * num_bytes)
        self.window = memory.view(self._size)
        windows = {self._peers.rank: self.window}
        for peer in self._peers.others:
            self._peers.send(peer, bytes([FIRST_KIND]), fd)
        os.close(fd)
        self._arrived = dict.fromkeys(self._peers.others, 0)
        self._rounds = 0

        def handle(rank: int, message: bytes, fds: list[int]) -> None:
            for fd in fds:
                windows[rank] = map_memory(fd).view(self._size)
                os.close(fd)

        self._peers.wait(lambda: [rank for rank in self._peers.others if rank not in windows], handle, "raw: windows")
        everyones = [windows[rank] for rank in range(group.size())]
        self._blocks = push_blocks.PeerWindows.of(everyones, self._peers.rank)
        self._pool = ThreadPoolExecutor(1) if helper else None

    def exchange(self, x_WN: Tensor) -> None:
        if self._pool is None:
            push_blocks.push(x_WN, self._blocks)
        else:
            self._pool.submit(push_blocks.push, x_WN, self._blocks).result()
        for peer in self._peers.others:
            self._peers.send(peer, bytes([FIRST_KIND]))
        self._rounds += 1
        self._peers.wait(self._missing, self._count, "raw")

    def _missing(self) -> list[int]:
        return [rank for rank, rounds in self._arrived.items() if rounds < self._rounds]

    def _count(self, rank: int, message: bytes, fds: list[int]) -> None:
        self._arrived[rank] += 1


def _plane(engine: bool) -> Callable[..., Plane]:
    def make(group: dist.ProcessGroup, num_bytes: int, config: BenchConfig) -> Plane:
        if dist.get_backend(group) == "gloo":
            return CpuPlane(group, num_bytes, engine)
        return CudaPlane(group, num_bytes, config, engine)

    return make


class CollectivePlane:
    """An all-to-all of torch.distributed over arrays of its own."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, config: BenchConfig) -> None:
        device = "cpu" if dist.get_backend(group) == "gloo" else torch.accelerator.current_accelerator()
        self.window = torch.empty(group.size(), num_bytes, dtype=torch.uint8, device=device)
        self._group = group

    def exchange(self, x_WN: Tensor) -> None:
        dist.all_to_all_single(self.window, x_WN, group=self._group)


PLANES = ("push", "dma")
# name: factory(group, num_bytes, config) -> Plane
BACKENDS: dict[str, Callable[..., Plane]] = {
    "torch": CollectivePlane,
    "push": _plane(engine=False),
    "dma": _plane(engine=True),
}


def check(op: str, config: BenchConfig, ranks: int) -> None:
    """Raise ConfigError for a backend that does not exist or not here, or a shape that cannot be shared out."""
    check_planes(config.backends or PLANES, config)
    if config.shape is not None:
        shapes.check_shape(config, ranks)
    for backend in config.backends:
        backend_factory(backend, BACKENDS, op)


def check_planes(names: Iterable[str], config: BenchConfig) -> None:
    """Raise ConfigError where the device has no memory that this module's planes can write across."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if set(names) & set(PLANES) and config.device != "cpu" and found is not None and found.type != "cuda":
        raise ConfigError(f"device={found.type}: push and dma run on cuda and cpu. Set backend=torch or device=cpu.")


def cases(op: str, config: BenchConfig, mesh: Mesh, num_bytes: int = 0) -> Iterator[Case]:
    """Sizes times backends; with a shape (or `num_bytes`), what must leave a rank in its dispatch."""
    num_bytes = shapes.crossing_bytes(config, mesh.world) if config.shape else num_bytes
    for size in [num_bytes] if num_bytes else collectives.sizes(config):
        block = block_bytes(size, mesh.world)
        for name in config.backends or list(BACKENDS):
            plane = backend_factory(name, BACKENDS, op)(mesh.group("ep"), block, config)
            work = make_work(plane, block, mesh)
            told = config.programs is not None and name == "push"
            facts = partial(dict[str, Any], programs=config.programs) if told else None
            yield Case(op, name, block * (mesh.world - 1), block, "uint8", work, label=config.shape or "", facts=facts)


def block_bytes(size: int, ranks: int) -> int:
    """What goes to each other rank when `size` bytes leave one: a multiple of 16, as the devices' stores are."""
    return -(-size // (16 * (ranks - 1))) * 16


def make_work(plane: Plane, num_bytes: int, mesh: Mesh) -> Work:
    """Blocks of `num_bytes` to every other rank; what is checked is each byte that must have come."""
    W, rank = mesh.world, mesh.rank
    index = torch.arange(num_bytes, device=mesh.device)
    x_WN = torch.stack([_value(rank, peer, index) for peer in range(W)])
    others = [source for source in range(W) if source != rank]

    def off() -> int:
        return sum(int((plane.window[source] != _value(source, rank, index)).sum()) for source in others)

    return Work(lambda: plane.exchange(x_WN), lambda: plane.window.fill_(255), off)


def _value(source: int, target: int, index: Tensor) -> Tensor:
    """The byte at `index` of what `source` sends to `target`; never 255."""
    return ((source * 7 + target * 11 + index * 3) % 251).to(torch.uint8)
