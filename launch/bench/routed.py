"""MoE operations: dispatch, combine and a whole layer, over any TokenDispatcher.

The tokens of every rank follow from (seed, rank), so each rank computes alone what must arrive: rows by expert, then by
source rank, then by route. Moved rows are compared bit by bit, sums and layers within the table of tolerances; what a
codec coded on any other way than dispatch, by its signal-to-noise ratio.

Legend: T tokens a rank, K routes a token, D width, R rows here, E experts, e experts of this rank, W ranks, F width of
an expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.comm.codec import EXCHANGES, Codec, decode_rows, encode_rows, wire_width
from moeweave.comm.dispatch import Dispatched, TokenDispatcher
from moeweave.comm.dispatchers.onesided_cuda import CudaOptions
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.engines import nodes_of
from moeweave.comm.nodes import Nodes
from moeweave.kernels_ext.tolerance import TOLERANCE, sqnr
from moeweave.launch.bench import ascend, budget, coded, torchtitan, traffic
from moeweave.launch.bench.case import Case, Work, backend_factory
from moeweave.launch.bench.shapes import Shape, check_shape, remote_pairs, route, shape_of
from moeweave.launch.schema import BenchConfig
from moeweave.moe.experts import ExpertWeights, local_experts
from moeweave.parallel.mesh import Mesh

OPS = ("dispatch", "combine", "moe_layer", "moe_layer_backward")


def _moeweave(name: str, combine: str | None = None) -> Callable[..., TokenDispatcher]:
    def make(group: dist.ProcessGroup, shape: Shape, dtype: torch.dtype, codec: Codec | None = None) -> TokenDispatcher:
        return make_dispatcher(name, group, shape.experts, top_k=shape.topk, combine=combine, codec=codec)

    return make


def _static(combine: str) -> Callable[..., TokenDispatcher]:
    """One-sided exchange with room for the worst routing: on CUDA no call waits for the host, a graph can hold it."""

    def make(
        group: dist.ProcessGroup,
        shape: Shape,
        dtype: torch.dtype,
        codec: Codec | None = None,
        num_sms: int | None = None,
    ) -> TokenDispatcher:
        routes = min(shape.topk, shape.experts // group.size())
        options = CudaOptions(capacity=group.size() * shape.tokens * routes, num_sms=num_sms)
        return make_dispatcher(
            "onesided", group, shape.experts, combine=combine, codec=codec, max_tokens=shape.tokens, cuda=options
        )

    return make


# name: factory(group, shape, dtype) -> dispatch and combine of a TokenDispatcher; one that takes `codec` as well is run
# with every codec of the config, one that takes `num_sms` with every number of multiprocessors
BACKENDS: dict[str, Callable[..., Any]] = {
    "alltoall": _moeweave("alltoall"),
    "allgather": _moeweave("allgather"),
    "allgather_prereduced": _moeweave("allgather", "prereduced"),
    "onesided": _moeweave("onesided"),
    "onesided_exact": _moeweave("onesided", "exact"),
    "onesided_static": _static("prereduced"),
    "onesided_static_exact": _static("exact"),
    "ascend": ascend.dispatcher_over("operators"),
    "ascend_gathered": ascend.dispatcher_over("gathered"),
    "hierarchical": _moeweave("hierarchical"),
    "torchtitan": torchtitan.MinimalAsyncEP,
}
CHECKED = 1 << 26  # elements that are compared at a time
NEVER_WAITS = ("onesided_static", "onesided_static_exact", "torchtitan", "ascend", "ascend_gathered")
WAITS_FOR_HOST = tuple(name for name in BACKENDS if name not in NEVER_WAITS)  # so no CUDA graph can hold them


def check(op: str, config: BenchConfig, ranks: int) -> None:
    """Raise ConfigError where shape, backend or number of ranks do not fit."""
    check_shape(config, ranks)
    factories = {name: backend_factory(name, BACKENDS, op) for name in config.backends or ["alltoall"]}
    ascend.check(op, config, factories)
    if "torchtitan" in factories:
        torchtitan.check(config)
    coded.check(config, factories, shape_of(config).hidden)


class Task:
    """Tokens, routes and expected results of this rank, on its device."""

    def __init__(self, config: BenchConfig, mesh: Mesh, codec: Codec) -> None:
        self.shape, self.mesh, self.codec = shape_of(config), mesh, codec
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.routes = [route(config, self.shape, rank) for rank in range(mesh.world)]
        self.ids_TK, self.weights_TK = (each.to(mesh.device) for each in self.routes[mesh.rank])
        self.x_TD = self.tokens(mesh.rank)
        self.num_local = self.shape.experts // mesh.world
        self.first = mesh.rank * self.num_local
        self.nodes = nodes_of(mesh.group("ep")) or Nodes(1, mesh.world)

    def tokens(self, rank: int) -> Tensor:
        """x_TD of any rank: small multiples of 1/16, another row for each (rank, token)."""
        t_T1 = torch.arange(self.shape.tokens, device=self.mesh.device).unsqueeze(1)
        d_D = torch.arange(self.shape.hidden, device=self.mesh.device)
        return (((rank * 31 + t_T1 * 7 + d_D * 3 + (t_T1 * d_D) % 5) % 61 - 30) / 16).to(self.dtype)

    def sent(self, rank: int) -> Tensor:
        """x_TD of any rank as the experts get it."""
        x_TD, (form, _, scale) = self.tokens(rank), self.codec.for_dispatch
        return decode_rows(encode_rows(x_TD, form, scale), form, scale, self.shape.hidden, self.dtype)

    def expected_rows(self) -> tuple[Tensor, Tensor]:
        """rows_RD and offsets_e (int64) that must arrive here."""
        experts, tokens, sources = [], [], []
        for source, (ids_TK, _) in enumerate(self.routes):
            token, column = torch.where((ids_TK >= self.first) & (ids_TK < self.first + self.num_local))
            experts.append(ids_TK[token, column] - self.first)
            tokens.append(token)
            sources.append(torch.full_like(token, source))
        expert_R, token_R, source_R = torch.cat(experts), torch.cat(tokens), torch.cat(sources)
        order = torch.argsort(expert_R, stable=True).to(self.mesh.device)
        source_R, token_R = source_R.to(self.mesh.device)[order], token_R.to(self.mesh.device)[order]
        rows_RD = self.x_TD.new_empty(len(order), self.shape.hidden)
        for source in range(self.mesh.world):
            here = source_R == source
            rows_RD[here] = self.sent(source)[token_R[here]]
        ends_e = torch.bincount(expert_R, minlength=self.num_local).cumsum(0)
        return rows_RD, ends_e.to(self.mesh.device)

    def expected_sum(self) -> Tensor:
        """y_TD of combine where each row comes back as it went: x times the sum of its weights."""
        return (self.sent(self.mesh.rank).float() * self.weights_TK.sum(1, keepdim=True)).to(self.dtype)

    def num_off(self, got: Tensor, want: Tensor, dtype: torch.dtype) -> int:
        """Elements further from `want` than 16 times the tolerance of its root mean square, or not finite.

        The tolerance is that of `dtype`, or what the codec leaves where another exchange than dispatch is coded (`want`
        is made without): then all elements are off as well if their signal-to-noise ratio is below that floor.
        """
        floor = coded.floor(self.codec)
        if got.shape != want.shape or (floor is not None and sqnr(got, want) < floor):
            return want.numel()
        tolerance = TOLERANCE[dtype] if floor is None else 10 ** (-floor / 20)
        # In pieces: the weights' gradients of a large layer fill half of the memory, and need no fp32 copies.
        pieces = list(zip(got.flatten().split(CHECKED), want.flatten().split(CHECKED), strict=True))
        squares = sum(float(want_N.float().square().sum(dtype=torch.float64)) for _, want_N in pieces)
        scale = max((squares / max(want.numel(), 1)) ** 0.5, 1e-12)
        off = 0
        for got_N, want_N in pieces:
            limit_N = 16 * tolerance * want_N.float().abs().clamp_min(scale)
            off += int((~((got_N.float() - want_N.float()).abs() <= limit_N)).sum())
        return off

    @property
    def remote_pairs(self) -> int:
        """Rows that must leave this rank if each token goes once to each rank that needs it."""
        return remote_pairs(self.ids_TK, self.mesh.rank, self.num_local, self.mesh.world)

    def sent_bytes(self, backend: str, op: str) -> tuple[int, int] | None:
        """Bytes of rows that a backend of this library sends from this rank, to all ranks and to other nodes'; None for
        other backends."""
        if backend not in traffic.UNITS:
            return None
        rows = traffic.count(self.ids_TK, self.mesh.rank, self.num_local, self.nodes)
        width, scale = self.shape.hidden, self.codec.scale
        across, inside = [], []
        for unit, exchange in zip(traffic.UNITS[backend], EXCHANGES, strict=True):
            coded_row = wire_width(getattr(self.codec, exchange), scale, width, self.dtype)
            across.append(rows[unit].across * coded_row)
            inside.append(rows[unit].inside * (width * self.dtype.itemsize if unit == "by_node" else coded_row))
        ways = {"dispatch": slice(0, 1), "combine": slice(1, 2), "moe_layer": slice(0, 2)}.get(op, slice(0, 4))
        network = sum(across[ways])
        return network + sum(inside[ways]), network


def cases(op: str, config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """One case a backend and codec."""
    shape, itemsize = shape_of(config), getattr(torch, config.dtype).itemsize
    row = shape.hidden * itemsize
    ways = 1 if op in ("dispatch", "combine") else 2 if op == "moe_layer" else 4
    for name in config.backends or ["alltoall"]:
        factory = backend_factory(name, BACKENDS, op)
        for codec, num_sms in itertools.product(coded.codecs_of(config, factory), budget.budgets_of(config, factory)):
            task = Task(config, mesh, codec)
            given = ([codec] if coded.takes_codec(factory) else []) + ([] if num_sms is None else [num_sms])
            dispatcher = factory(mesh.group("ep"), shape, task.dtype, *given)
            if op in ("dispatch", "combine"):
                work = (_dispatch if op == "dispatch" else _combine)(task, dispatcher)
            else:
                work = _layer(task, dispatcher, op == "moe_layer_backward", config.seed)
            sent = task.sent_bytes(name, op)
            yield Case(
                op,
                name + ("" if codec == Codec() else f" {codec}") + ("" if num_sms is None else f" {num_sms} SMs"),
                shape.tokens * row,
                shape.tokens * shape.hidden,
                config.dtype,
                work,
                logical_bytes=task.remote_pairs * row * ways,
                wire_bytes=None if sent is None else sent[0],
                network_bytes=None if sent is None else sent[1],
                label=config.shape or f"T{shape.tokens} D{shape.hidden} E{shape.experts} K{shape.topk}",
                graph=name not in WAITS_FOR_HOST,
                facts=None if num_sms is None else partial(dict, num_sms=num_sms),
            )


class _Kept:
    """Work whose result is a value of its own: the last one is kept, and asked for when it is checked."""

    def __init__(self, run: Callable[[], Any], off: Callable[[Any], int]) -> None:
        self._run, self._off, self._last = run, off, None

    def work(self) -> Work:
        return Work(self.run, self.reset, lambda: self._off(self._last))

    def run(self) -> None:
        self._last = self._run()

    def reset(self) -> None:
        self._last = None


def _dispatch(task: Task, dispatcher: TokenDispatcher) -> Work:
    want_RD, ends_e = task.expected_rows()

    @torch.no_grad()
    def run() -> Dispatched:
        return dispatcher.dispatch(task.x_TD, task.ids_TK, task.weights_TK)

    def off(found: Dispatched) -> int:
        wrong = int((found.offsets_e.long() != ends_e).sum())
        rows_RD = found.rows_RD[: len(want_RD)]
        return wrong + (want_RD.numel() if rows_RD.shape != want_RD.shape else int((rows_RD != want_RD).sum()))

    return _Kept(run, off).work()


@torch.no_grad()
def _combine(task: Task, dispatcher: TokenDispatcher) -> Work:
    dispatched = dispatcher.dispatch(task.x_TD, task.ids_TK, task.weights_TK)
    rows_RD = dispatched.rows_RD.clone()

    @torch.no_grad()
    def run() -> Tensor:
        return dispatcher.combine(rows_RD, task.weights_TK, dispatched)

    return _Kept(run, lambda y_TD: task.num_off(y_TD, task.expected_sum(), task.dtype)).work()


def expert_weights(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """up [e, 2F, D] and down [e, D, F] of this rank's experts."""
    shape, device = task.shape, task.mesh.device
    generator = torch.Generator(device=device).manual_seed(seed * 7919 + task.mesh.rank)
    size = (task.num_local, 2 * shape.expert_hidden, shape.hidden)
    up = torch.randn(size, generator=generator, device=device, dtype=task.dtype) * shape.hidden**-0.5
    size = (task.num_local, shape.hidden, shape.expert_hidden)
    down = torch.randn(size, generator=generator, device=device, dtype=task.dtype) * shape.expert_hidden**-0.5
    return up, down


def _layer(task: Task, dispatcher: TokenDispatcher, backward: bool, seed: int) -> Work:
    up, down = expert_weights(task, seed)
    weights = ExpertWeights(gate_up=up, down=down, apply_gate=swiglu)
    x_TD = task.x_TD.clone().requires_grad_(backward)
    weights_TK = task.weights_TK.clone().requires_grad_(backward)
    if backward:
        weights = replace(weights, gate_up=up.requires_grad_(), down=down.requires_grad_())

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            dispatched = dispatcher.dispatch(x_TD, task.ids_TK, weights_TK)
            rows_RD = local_experts(weights, dispatched.rows_RD, dispatched.offsets_e)
            y_TD = dispatcher.combine(rows_RD, weights_TK, dispatched)
        if not backward:
            return (y_TD,)
        # Any gradient that every rank can compute does.
        return (y_TD.detach(), *torch.autograd.grad(y_TD, (x_TD, weights_TK, up, down), task.x_TD))

    def off(found: tuple[Tensor, ...]) -> int:
        want = _plain_layer(task, up, down, backward)
        return sum(task.num_off(got, expected, task.dtype) for got, expected in zip(found, want, strict=True))

    return _Kept(run, off).work()


def swiglu(gate_up_RF: Tensor) -> Tensor:
    gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
    return nn.functional.silu(gate_RF) * up_RF


def _plain_layer(task: Task, up: Tensor, down: Tensor, backward: bool) -> list[Tensor]:
    """The layer without a dispatcher: each rank runs its experts on everybody's tokens, one at a time; all-reduce.

    Returns this rank's y_TD and, with `backward`, the gradients of x_TD, weights_TK, up and down.
    """
    x_ND, grad_ND = (torch.cat([each(rank) for rank in range(task.mesh.world)]) for each in (task.sent, task.tokens))
    x_ND.requires_grad_(backward)
    ids_NK, weights_NK = (torch.cat(each).to(task.mesh.device) for each in zip(*task.routes, strict=True))
    weights_NK.requires_grad_(backward)
    up, down = (each.detach().clone().requires_grad_(backward) for each in (up, down))
    with torch.set_grad_enabled(backward):
        y_ND = torch.zeros(x_ND.shape, device=x_ND.device)
        for local in range(task.num_local):
            token, column = torch.where(ids_NK == task.first + local)
            out_RD = swiglu(x_ND[token] @ up[local].T) @ down[local].T
            y_ND = y_ND.index_add(0, token, out_RD.float() * weights_NK[token, column].unsqueeze(1))
    shared, own = [y_ND.detach()], []
    if backward:
        leaves = (x_ND, weights_NK, up, down)
        grad_x, grad_weights, *own = torch.autograd.grad(y_ND, leaves, grad_ND.float())
        shared += [grad_x.float(), grad_weights]
    here = slice(task.mesh.rank * task.shape.tokens, (task.mesh.rank + 1) * task.shape.tokens)
    for part in shared:
        dist.all_reduce(part, group=task.mesh.group("ep"))
    dtypes = (task.dtype, task.dtype, torch.float32)
    return [part[here].to(dtype) for part, dtype in zip(shared, dtypes, strict=False)] + own
