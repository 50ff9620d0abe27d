"""torchtitan's MinimalAsyncEP as a backend; an adapter of another library looks the same.

An adapter is a factory `(group, shape, dtype)` whose result has `dispatch` and `combine` as comm/dispatch.py says
them; what only the library itself needs goes through `Dispatched.handle`. Name it in `routed.BACKENDS`, or as
`backend=module:factory` from outside. Checked against torchtitan 0.3.0.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.dispatch import Dispatched
from moeweave.launch.bench.shapes import Shape
from moeweave.launch.schema import BenchConfig, ConfigError

PACKAGE = "torchtitan.distributed.minimal_async_ep"


def check(config: BenchConfig) -> None:
    """Raise ConfigError where the package is missing or the device is not its own."""
    if config.device == "cpu" or not torch.cuda.is_available():
        raise ConfigError("backend=torchtitan: runs on CUDA devices only. Leave it out, or set device=cuda on such.")
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        raise ConfigError(
            f"backend=torchtitan: {error}. Install torchtitan 0.3.0 or newer, or leave it out."
        ) from error


class MinimalAsyncEP:
    """A row a route, pushed through symmetric memory straight to its place in expert-major order; combine is exact."""

    def __init__(self, group: ProcessGroup, shape: Shape, dtype: torch.dtype) -> None:
        self.library: Any = importlib.import_module(PACKAGE)
        self.size, self.num_experts = group.size(), shape.experts
        local = shape.experts // self.size
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if device.type != "cpu":
            device = torch.device(device.type, torch.accelerator.current_device_index())
        self.library.init_buffer(group, shape.hidden, shape.tokens, local, shape.topk, dtype, device)
        self.capacity = self.size * shape.tokens * min(shape.topk, local)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        ids_N = ids_TK.reshape(-1)
        counts_E = ids_N.new_zeros(self.num_experts).scatter_add_(0, ids_N, torch.ones_like(ids_N))
        rows_RD, *rest = self.library.dispatch_op(x_TD, ids_TK, counts_E, self.capacity, self.size)
        if rows_RD.requires_grad:
            rows_RD = rows_RD.clone()  # torchtitan trains with recompute only: backward writes into the same buffer
        handle: Any = rest
        return Dispatched(rows_RD, None, None, rest[-1].cumsum(0).int(), handle)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        handle: Any = dispatched.handle
        targets, slots, sources, origins, num_rows, routes, places, _ = handle
        y_TD: Tensor = self.library.combine_op(
            rows_RD,
            targets,
            slots,
            sources,
            origins,
            num_rows,
            places,
            routes,
            weights_TK.reshape(-1),
            *weights_TK.shape,
        )[0]
        return y_TD
