"""Backends of NPUs: torch.distributed's collectives as `hccl`, the dispatchers over Ascend's operators as `ascend` and
`ascend_gathered`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from moeweave.comm.codec import Codec
from moeweave.comm.dispatch import TokenDispatcher
from moeweave.comm.dispatchers.ascend_limits import AscendOptions, series_of
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.launch.bench.shapes import Shape
from moeweave.launch.schema import BenchConfig, ConfigError

NAMES = ("hccl", "ascend", "ascend_gathered")


def dispatcher_over(path: str) -> Callable[..., TokenDispatcher]:
    """A factory as `routed.BACKENDS` has them, for this machine's series and as many tokens as the shape has."""

    def make(group: dist.ProcessGroup, shape: Shape, dtype: torch.dtype, codec: Codec | None = None) -> TokenDispatcher:
        series = series_of(torch.get_device_module("npu").get_device_name())
        options = AscendOptions(series, shape.tokens, path)
        return make_dispatcher("ascend", group, shape.experts, codec=codec, ascend=options)

    return make


def check(op: str, config: BenchConfig, backends: Iterable[str]) -> None:
    """Raise ConfigError where a backend of NPUs would meet another device, or an operation that it has not."""
    for name in backends:
        if name not in NAMES:
            continue
        found = torch.accelerator.current_accelerator(check_available=True)
        device = config.device or ("cpu" if found is None else found.type)
        if device != "npu":
            raise ConfigError(f"backend={name}: it is for NPUs, and the device is {device}. Use it with device=npu.")
        if op == "moe_layer_backward" and name != "hccl":
            raise ConfigError(f"backend={name}: its operators have no gradient. Use op=moe_layer, or backend=alltoall.")
