"""Backends for moeweave-bench that lose one element of every result: what its checks must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.launch.bench.collectives import TorchCollectives
from moeweave.launch.bench.raw import BACKENDS


def flip(x: Tensor) -> None:
    if x.numel():
        x.view(-1)[x.numel() // 2] += 8


class Collectives(TorchCollectives):
    def all_reduce(self, out: Tensor, x: Tensor) -> None:
        super().all_reduce(out, x)
        flip(out)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        super().all_gather(out, x)
        flip(out)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        super().reduce_scatter(out, x)
        flip(out)

    def all_to_all(self, out: Tensor, x: Tensor, receives: Any, sends: Any) -> None:
        super().all_to_all(out, x, receives, sends)
        flip(out)

    def broadcast(self, out: Tensor, source: int) -> None:
        super().broadcast(out, source)
        flip(out)

    def exchange(self, out: Tensor | None, x: Tensor | None, source: int, target: int) -> None:
        super().exchange(out, x, source, target)
        if out is not None:
            flip(out)


class Dispatcher:
    """Loses an element of the rows that arrive, or of the sums."""

    def __init__(self, inner: Any, what: str) -> None:
        self.inner, self.what = inner, what

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Any:
        found = self.inner.dispatch(x_TD, ids_TK, weights_TK)
        if self.what != "dispatch":
            return found
        rows_RD = found.rows_RD.clone()
        flip(rows_RD.detach())
        return replace(found, rows_RD=rows_RD)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Any) -> Tensor:
        y_TD: Tensor = self.inner.combine(rows_RD, weights_TK, dispatched)
        if self.what == "combine":
            y_TD = y_TD.clone()
            flip(y_TD.detach())
        return y_TD


def dispatching(group: Any, shape: Any, dtype: Any) -> Dispatcher:
    return coded_dispatching(group, shape, dtype, None)


def combining(group: Any, shape: Any, dtype: Any) -> Dispatcher:
    return coded_combining(group, shape, dtype, None)


def coded_dispatching(group: Any, shape: Any, dtype: Any, codec: Any) -> Dispatcher:
    return Dispatcher(make_dispatcher("alltoall", group, shape.experts, top_k=shape.topk, codec=codec), "dispatch")


def coded_combining(group: Any, shape: Any, dtype: Any, codec: Any) -> Dispatcher:
    return Dispatcher(make_dispatcher("alltoall", group, shape.experts, top_k=shape.topk, codec=codec), "combine")


class Plane:
    """Loses a byte of what rank 0 sends to the last rank."""

    def __init__(self, group: Any, num_bytes: int, config: Any) -> None:
        self.inner = BACKENDS["push"](group, num_bytes, config)
        self.window = self.inner.window
        self.last = group.rank() == group.size() - 1

    def exchange(self, x_WN: Tensor) -> None:
        self.inner.exchange(x_WN)
        if self.last:
            self.window[0, -1] ^= 1
