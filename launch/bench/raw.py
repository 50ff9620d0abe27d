"""`op=raw`: contiguous blocks to every other rank by writing into its memory: what the links give without a collective.

    push    this device's cores write (Triton on CUDA, the calling thread on a CPU)
    dma     copy engines write (on a CPU, a helper thread)

The time includes the barrier after which every block is known to have arrived. `size` is what leaves a rank.
Legend: W ranks, N bytes of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.kernels_ext import push_blocks
from moeweave.launch.bench import collectives, routed
from moeweave.launch.bench.case import Case, Work, backend_factory
from moeweave.launch.schema import BenchConfig, ConfigError
from moeweave.parallel.mesh import Mesh


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
        self._peers = push_blocks.Peers.of(views, rank)
        self._programs = config.programs or 0
        self._streams = [torch.cuda.Stream(device) for _ in range(size - 1)] if engine else []

    def exchange(self, x_WN: Tensor) -> None:
        if self._streams:
            self._copy(x_WN)
        else:
            push_blocks.push(x_WN, self._peers, num_programs=self._programs)
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


def _plane(engine: bool) -> Callable[..., Plane]:
    def make(group: dist.ProcessGroup, num_bytes: int, config: BenchConfig) -> Plane:
        return CudaPlane(group, num_bytes, config, engine)

    return make


# name: factory(group, num_bytes, config) -> Plane
BACKENDS: dict[str, Callable[..., Any]] = {"push": _plane(engine=False), "dma": _plane(engine=True)}


def check(op: str, config: BenchConfig, ranks: int) -> None:
    """Raise ConfigError where sizes cannot be shared out, or the device has no memory that peers can write."""
    check_planes(config, ranks)
    for backend in config.backends:
        backend_factory(backend, BACKENDS, op)


def check_planes(config: BenchConfig, ranks: int) -> None:
    """`check`, for planes that this module chooses."""
    for size in [] if config.shape else collectives.sizes(config):
        if size % (ranks - 1):
            least = -(-config.min_size // (ranks - 1)) * (ranks - 1)
            raise ConfigError(
                f"min_size={config.min_size}, factor={config.factor}: raw cannot share out {size} bytes to "
                f"{ranks - 1} other ranks. Set min_size={least}."
            )


def cases(op: str, config: BenchConfig, mesh: Mesh, num_bytes: int = 0) -> Iterator[Case]:
    """Sizes times backends; with a shape (or `num_bytes`), what must leave a rank in its dispatch."""
    num_bytes = routed.crossing_bytes(config, mesh.world) if config.shape else num_bytes
    for size in [num_bytes] if num_bytes else collectives.sizes(config):
        for name in config.backends or list(BACKENDS):
            block = -(-size // (mesh.world - 1))
            block = -(-block // 16) * 16 if num_bytes else block
            plane = backend_factory(name, BACKENDS, op)(mesh.group("ep"), block, config)
            work = make_work(plane, block, mesh)
            yield Case(op, name, block * (mesh.world - 1), block, "uint8", work, label=config.shape or "")


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
