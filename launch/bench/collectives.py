"""Collectives and point-to-point operations, with the sizes, counts and factors of nccl-tests.

Every value is a small whole number that follows from (rank, index), so that each rank knows the right result alone and
sums are exact in every dtype.

Legend: N elements, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.launch.bench.case import Case, backend_factory
from moeweave.launch.schema import BenchConfig, ConfigError
from moeweave.parallel.mesh import Mesh

# op: bus-bandwidth factor over W ranks.
FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda W: 2 * (W - 1) / W,
    "all_gather": lambda W: (W - 1) / W,
    "reduce_scatter": lambda W: (W - 1) / W,
    "all_to_all": lambda W: (W - 1) / W,
    "all_to_all_v": lambda W: (W - 1) / W,
    "broadcast": lambda W: 1.0,
    "send_recv": lambda W: 1.0,
    "send_recv_both": lambda W: 1.0,
    "pairs": lambda W: 1.0,
}
SPLIT = ("all_gather", "reduce_scatter", "all_to_all", "all_to_all_v")  # the array is a block for each rank
IN_PLACE = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


class Collectives(Protocol):
    """What a backend for collectives offers; every method fills `out` [N] and may return before the device is done."""

    def all_reduce(self, out: Tensor, x: Tensor) -> None: ...
    def all_gather(self, out: Tensor, x: Tensor) -> None: ...
    def reduce_scatter(self, out: Tensor, x: Tensor) -> None: ...
    def all_to_all(self, out: Tensor, x: Tensor, receives: list[int] | None, sends: list[int] | None) -> None: ...
    def broadcast(self, out: Tensor, source: int) -> None: ...
    def exchange(self, out: Tensor | None, x: Tensor | None, source: int, target: int) -> None: ...


class TorchCollectives:
    """torch.distributed: NCCL on CUDA, HCCL on NPUs, gloo on the CPU.

    Its all_reduce works in place only: the out-of-place time has a copy of the array in it, which nccl-tests' has not.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def all_reduce(self, out: Tensor, x: Tensor) -> None:
        if out is not x:
            out.copy_(x)
        dist.all_reduce(out, group=self.group)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        dist.all_gather_into_tensor(out, x, group=self.group)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        dist.reduce_scatter_tensor(out, x, group=self.group)

    def all_to_all(self, out: Tensor, x: Tensor, receives: list[int] | None, sends: list[int] | None) -> None:
        dist.all_to_all_single(out, x, receives, sends, group=self.group)

    def broadcast(self, out: Tensor, source: int) -> None:
        dist.broadcast(out, group=self.group, group_src=source)

    def exchange(self, out: Tensor | None, x: Tensor | None, source: int, target: int) -> None:
        """Receive `out` from `source` and send `x` to `target`, at the same time; None: not this rank's part."""
        ops = [] if x is None else [dist.P2POp(dist.isend, x, group=self.group, group_peer=target)]
        ops += [] if out is None else [dist.P2POp(dist.irecv, out, group=self.group, group_peer=source)]
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()


BACKENDS: dict[str, Callable[..., Collectives]] = {"torch": TorchCollectives}


def sizes(config: BenchConfig) -> list[int]:
    """Bytes from min_size to max_size, times `factor` each."""
    found, size = [], config.min_size
    while size <= config.max_size:
        found.append(size)
        size *= config.factor
    return found


def check(op: str, config: BenchConfig, ranks: int) -> None:
    """Raise ConfigError where a size cannot be shared out."""
    step = torch.empty((), dtype=getattr(torch, config.dtype)).element_size() * (ranks if op in SPLIT else 1)
    for size in sizes(config):
        if size % step:
            least = -(-config.min_size // step) * step
            raise ConfigError(
                f"min_size={config.min_size}, factor={config.factor}: {op} cannot share out {size} bytes: sizes must "
                f"be multiples of {step} ({config.dtype}, {ranks} ranks). Set min_size={least}."
            )
    for backend in config.backends:
        backend_factory(backend, BACKENDS, op)


def value(rank: int | Tensor, index: Tensor) -> Tensor:
    """What `rank` has at `index`: a whole number below 13."""
    return (rank * 7 + index * 3) % 13


def cases(op: str, config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """The cases of one operation: sizes, times in and out of place, times backends."""
    group = mesh.group("ep")
    backends = {
        name: backend_factory(name, BACKENDS, op)(group) for name in [b for b in config.backends if b] or ["torch"]
    }
    for size in sizes(config):
        for name, transport in backends.items():
            if op == "pairs":
                yield from _pairs(transport, name, size, config, mesh)
                continue
            yield _case(op, transport, name, size, config, mesh, in_place=op == "broadcast")
            if config.in_place and op in IN_PLACE and op != "broadcast":
                yield _case(op, transport, name, size, config, mesh, in_place=True)


def _case(
    op: str, transport: Collectives, name: str, size: int, config: BenchConfig, mesh: Mesh, *, in_place: bool
) -> Case:
    dtype: torch.dtype = getattr(torch, config.dtype)
    num, W = size // dtype.itemsize, mesh.world
    build = {"all_to_all_v": _all_to_all_v, "send_recv": _ring, "send_recv_both": _ring_both}.get(op)
    if build is not None:
        run, wrong = build(transport, num, dtype, mesh)
    else:
        run, wrong = _dense(op, transport, num, dtype, mesh, in_place)
    count = num // W if op in SPLIT else num
    redop = "sum" if op in ("all_reduce", "reduce_scatter") else "none"
    return Case(op, name, size, count, config.dtype, run, wrong, FACTORS[op](W), redop, in_place)


Built = tuple[Callable[[], object], Callable[[], int]]


def _dense(op: str, transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh, in_place: bool) -> Built:
    W, rank, device = mesh.world, mesh.rank, mesh.device
    block = num // W
    index = torch.arange(num, device=device)
    mine, theirs = value(rank, index), torch.stack([value(other, index) for other in range(W)])
    here = slice(rank * block, (rank + 1) * block)
    start, want = {
        "all_reduce": lambda: (mine, theirs.sum(0)),
        "all_gather": lambda: (mine[here], torch.cat([theirs[r, r * block : (r + 1) * block] for r in range(W)])),
        "reduce_scatter": lambda: (mine, theirs[:, here].sum(0)),
        "all_to_all": lambda: (mine, theirs[:, here].reshape(-1)),
        "broadcast": lambda: (mine, theirs[0]),
    }[op]()
    start, want = start.to(dtype), want.to(dtype)
    x, out = start.clone(), torch.full_like(want, -1)
    if in_place:
        whole = torch.full((max(x.numel(), out.numel()),), -1, dtype=dtype, device=device)
        x = whole[here] if op == "all_gather" else whole[: x.numel()]
        out = whole[here] if op == "reduce_scatter" else whole[: out.numel()]
        out = x if op in ("all_reduce", "broadcast") else out
    call: Callable[[], object] = {
        "all_reduce": lambda: transport.all_reduce(out, x),
        "all_gather": lambda: transport.all_gather(out, x),
        "reduce_scatter": lambda: transport.reduce_scatter(out, x),
        "all_to_all": lambda: transport.all_to_all(out, x, None, None),
        "broadcast": lambda: transport.broadcast(out, 0),
    }[op]

    def wrong() -> int:
        out.fill_(-1)
        x.copy_(start)
        call()
        return int((out != want).sum())

    return call, wrong


def _all_to_all_v(transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh) -> Built:
    """Skewed counts: rank r sends twice as much to rank 0 as the mean, and the rest evenly to the others."""
    W, rank = mesh.world, mesh.rank
    first = min(2 * (num // W), num)
    rest = (num - first) // (W - 1)
    sends = [first, *[rest] * (W - 1)]
    receives = [sends[rank]] * W
    index = torch.arange(sum(sends), device=mesh.device)
    x = value(rank, index).to(dtype)
    start = sum(sends[:rank])
    want = torch.cat([value(other, index[start : start + sends[rank]]) for other in range(W)]).to(dtype)
    out = torch.full_like(want, -1)
    return _checked(lambda: transport.all_to_all(out, x, receives, sends), out, want)


def _ring(transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh) -> Built:
    """Every rank sends to the next and receives from the one before."""
    W, rank = mesh.world, mesh.rank
    index = torch.arange(num, device=mesh.device)
    x, want = value(rank, index).to(dtype), value((rank - 1) % W, index).to(dtype)
    out = torch.full_like(want, -1)
    return _checked(lambda: transport.exchange(out, x, (rank - 1) % W, (rank + 1) % W), out, want)


def _ring_both(transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh) -> Built:
    """Neighbours 0-1, 2-3, ... send to each other at the same time; the last of an odd number of ranks rests."""
    peer = mesh.rank ^ 1
    index = torch.arange(num, device=mesh.device)
    if peer >= mesh.world:
        return (lambda: None), (lambda: 0)
    x, want = value(mesh.rank, index).to(dtype), value(peer, index).to(dtype)
    out = torch.full_like(want, -1)
    return _checked(lambda: transport.exchange(out, x, peer, peer), out, want)


def _pairs(transport: Collectives, name: str, size: int, config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """One direction between two ranks while the others rest: the N x N matrix."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    index = torch.arange(size // dtype.itemsize, device=mesh.device)
    for source in range(mesh.world):
        for target in range(mesh.world):
            if source == target:
                continue
            x = value(source, index).to(dtype) if mesh.rank == source else None
            out = torch.full(index.shape, -1, dtype=dtype, device=mesh.device) if mesh.rank == target else None
            run, wrong = _pair(transport, out, x, source, target, value(source, index).to(dtype))
            yield Case("pairs", name, size, index.numel(), config.dtype, run, wrong, label=f"{source}->{target}")


def _pair(
    transport: Collectives, out: Tensor | None, x: Tensor | None, source: int, target: int, want: Tensor
) -> Built:
    run = lambda: transport.exchange(out, x, source, target)  # noqa: E731
    return (run, lambda: int(run() is not None)) if out is None else _checked(run, out, want)


def _checked(run: Callable[[], object], out: Tensor, want: Tensor) -> Built:
    def wrong() -> int:
        out.fill_(-1)
        run()
        return int((out != want).sum())

    return run, wrong
