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

from moeweave.launch.bench import ascend
from moeweave.launch.bench.case import Case, Work, backend_factory
from moeweave.launch.schema import BenchConfig, ConfigError
from moeweave.parallel.mesh import Mesh

# torch 2.13 renamed the two and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

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
        _all_gather(out, x, group=self.group)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        _reduce_scatter(out, x, group=self.group)

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


BACKENDS: dict[str, Callable[..., Collectives]] = {"torch": TorchCollectives, "hccl": TorchCollectives}


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
    ascend.check(op, config, config.backends)
    for backend in config.backends:
        backend_factory(backend, BACKENDS, op)


def value(rank: int, index: Tensor, ranks: int) -> Tensor:
    """What `rank` has at `index`: a whole number below 13, lower where a bfloat16 could not hold the ranks' sum."""
    return (rank * 7 + index * 3) % max(2, min(13, 256 // ranks + 1))


def backends(config: BenchConfig, group: dist.ProcessGroup, op: str) -> dict[str, Collectives]:
    """The backends that the config lists, over `group`."""
    return {name: backend_factory(name, BACKENDS, op)(group) for name in config.backends or ["torch"]}


def cases(op: str, config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """The cases of one operation: sizes, times in and out of place, times backends."""
    transports = backends(config, mesh.group("ep"), op)
    for size in sizes(config):
        for name, transport in transports.items():
            if op == "pairs":
                yield from _pairs(transport, name, size, config, mesh)
                continue
            for in_place in places(op, config):
                yield _case(op, transport, name, size, config, mesh, in_place=in_place)


def places(op: str, config: BenchConfig) -> tuple[bool, ...]:
    """Out of place, in place: broadcast has the second form only, and few have both."""
    if op == "broadcast":
        return (True,)
    return (False, True) if config.in_place and op in IN_PLACE else (False,)


def _case(
    op: str, transport: Collectives, name: str, size: int, config: BenchConfig, mesh: Mesh, *, in_place: bool
) -> Case:
    dtype: torch.dtype = getattr(torch, config.dtype)
    num, W = size // dtype.itemsize, mesh.world
    work = make_work(op, transport, num, dtype, mesh, in_place=in_place)
    count = num // W if op in SPLIT else num
    redop = "sum" if op in ("all_reduce", "reduce_scatter") else "none"
    return Case(op, name, size, count, config.dtype, work, FACTORS[op](W), redop, in_place)


def make_work(op: str, transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh, *, in_place: bool) -> Work:
    """One collective over `num` elements, with arrays of its own."""
    build = {"all_to_all_v": _all_to_all_v, "send_recv": _ring, "send_recv_both": _ring_both}.get(op)
    if build is not None:
        return build(transport, num, dtype, mesh)
    return _dense(op, transport, num, dtype, mesh, in_place)


def _dense(op: str, transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh, in_place: bool) -> Work:
    rank, here = mesh.rank, _block(mesh.rank, num, mesh)
    start, want = (each.to(dtype) for each in _before_and_after(op, num, mesh))
    x, out = start.clone(), torch.full_like(want, -1)
    if in_place:
        whole = torch.full((max(x.numel(), out.numel()),), -1, dtype=dtype, device=mesh.device)
        x = whole[here] if op == "all_gather" else whole[: x.numel()]
        out = whole[here] if op == "reduce_scatter" else whole[: out.numel()]
        out = x if op in ("all_reduce", "broadcast") else out
    run: Callable[[], object] = {
        "all_reduce": lambda: transport.all_reduce(out, x),
        "all_gather": lambda: transport.all_gather(out, x),
        "reduce_scatter": lambda: transport.reduce_scatter(out, x),
        "all_to_all": lambda: transport.all_to_all(out, x, None, None),
        "broadcast": lambda: transport.broadcast(out, 0),
    }[op]

    def reset() -> None:
        out.fill_(-1)
        if not (op == "broadcast" and rank):  # the root's values must come from the root
            x.copy_(start)

    return Work(run, reset, lambda: int((out != want).sum()))


def _block(rank: int, num: int, mesh: Mesh) -> slice:
    size = num // mesh.world
    return slice(rank * size, (rank + 1) * size)


def _before_and_after(op: str, num: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """What this rank puts in, and what must come out."""
    W, rank = mesh.world, mesh.rank
    index = torch.arange(num, device=mesh.device)

    def of(other: int, part: slice = slice(None)) -> Tensor:
        return value(other, index[part], W)

    here = _block(rank, num, mesh)
    if op == "all_reduce":
        return of(rank), sum((of(other) for other in range(1, W)), start=of(0))
    if op == "reduce_scatter":
        return of(rank), sum((of(other, here) for other in range(1, W)), start=of(0, here))
    if op == "all_gather":
        return of(rank, here), torch.cat([of(other, _block(other, num, mesh)) for other in range(W)])
    if op == "all_to_all":
        return of(rank), torch.cat([of(other, here) for other in range(W)])
    return of(rank), of(0)


def _all_to_all_v(transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh) -> Work:
    """Skewed counts: rank r sends twice as much to rank 0 as the mean, and the rest evenly to the others."""
    W, rank = mesh.world, mesh.rank
    first = min(2 * (num // W), num)
    rest = (num - first) // (W - 1)
    sends = [first, *[rest] * (W - 1)]
    receives = [sends[rank]] * W
    index = torch.arange(sum(sends), device=mesh.device)
    x = value(rank, index, W).to(dtype)
    start = sum(sends[:rank])
    want = torch.cat([value(other, index[start : start + sends[rank]], W) for other in range(W)]).to(dtype)
    out = torch.full_like(want, -1)
    return checked(lambda: transport.all_to_all(out, x, receives, sends), out, want)


def _ring(transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh) -> Work:
    """Every rank sends to the next and receives from the one before."""
    W, rank = mesh.world, mesh.rank
    index = torch.arange(num, device=mesh.device)
    x, want = value(rank, index, W).to(dtype), value((rank - 1) % W, index, W).to(dtype)
    out = torch.full_like(want, -1)
    return checked(lambda: transport.exchange(out, x, (rank - 1) % W, (rank + 1) % W), out, want)


def _ring_both(transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh) -> Work:
    """Neighbours 0-1, 2-3, ... send to each other at the same time; the last of an odd number of ranks rests."""
    peer = mesh.rank ^ 1
    index = torch.arange(num, device=mesh.device)
    if peer >= mesh.world:
        return Work(_nothing, _nothing, lambda: 0)
    x, want = value(mesh.rank, index, mesh.world).to(dtype), value(peer, index, mesh.world).to(dtype)
    out = torch.full_like(want, -1)
    return checked(lambda: transport.exchange(out, x, peer, peer), out, want)


def _pairs(transport: Collectives, name: str, size: int, config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """One direction between two ranks while the others rest: the N x N matrix."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    num = size // dtype.itemsize
    for source in range(mesh.world):
        for target in range(mesh.world):
            if source != target:
                work = _pair(transport, num, dtype, mesh, source, target)
                yield Case("pairs", name, size, num, config.dtype, work, label=f"{source}->{target}")


def _pair(transport: Collectives, num: int, dtype: torch.dtype, mesh: Mesh, source: int, target: int) -> Work:
    if mesh.rank not in (source, target):
        return Work(_nothing, _nothing, lambda: 0)
    x = value(source, torch.arange(num, device=mesh.device), mesh.world).to(dtype)
    if mesh.rank == source:
        return Work(lambda: transport.exchange(None, x, source, target), _nothing, lambda: 0)
    out = torch.full_like(x, -1)
    return checked(lambda: transport.exchange(out, None, source, target), out, x)


def checked(run: Callable[[], object], out: Tensor, want: Tensor) -> Work:
    """Work whose result `out` must be `want`."""
    return Work(run, lambda: out.fill_(-1), lambda: int((out != want).sum()))


def _nothing() -> None:
    pass
