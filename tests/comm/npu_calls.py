"""Every call of an NPU operator that the library makes, recorded off an NPU: name and arguments."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.ascend import AscendDispatcher
from moeweave.comm.dispatchers.ascend_limits import AscendOptions
from moeweave.kernels_ext import npu
from moeweave.kernels_ext.expand_rows import npu_impl as expand_npu
from moeweave.kernels_ext.gating_top_k import Gating
from moeweave.kernels_ext.gating_top_k import npu_impl as gating_npu
from moeweave.kernels_ext.grouped_mm import npu_impl as grouped_mm_npu
from moeweave.kernels_ext.quantize_rows import npu_impl as quantize_npu
from moeweave.kernels_ext.scaled_grouped_mm import npu_impl as scaled_npu
from moeweave.kernels_ext.swiglu_quant import npu_impl as swiglu_npu


class FakeGroup:
    """As much of a group of two ranks as the dispatcher reads."""

    group_name = "two"


def x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def run_dispatcher(call: npu.Call, series: str, quantize: bool) -> None:
    given = dict(group_name="two", call=call, codec=Codec.parse("int8" if quantize else "none"))
    dispatcher = AscendDispatcher(FakeGroup(), 4, AscendOptions(series, 4), **given)  # type: ignore[arg-type]
    ids, weights = torch.tensor([[0, 3], [1, 2]]), x(2, 2, dtype=torch.float32)
    dispatched = dispatcher.dispatch(x(2, 1024), ids, weights)
    dispatcher.combine(x(16, 1024), weights, dispatched)
    if series == "A3":
        dispatcher.combine(x(16, 1024), weights, dispatched, shared_TD=x(2, 1024))


def run_routing() -> None:
    ids = torch.tensor([[0, 3], [1, 2], [-1, 0], [3, 2]])
    for dtype, scales in ((torch.bfloat16, None), (torch.int8, x(4, dtype=torch.float32))):
        _, _, places, _ = expand_npu.expand(x(4, 16, dtype=dtype), scales, ids, (2, 4), 4)
        expand_npu.reduce(x(8, 16), places, x(4, 2))
    for rule in (Gating(2), Gating(2, "topk_softmax"), Gating(2, "sigmoid", num_groups=4, top_groups=2)):
        gating_npu.forward(x(4, 32), rule, x(32) if rule.kind == "sigmoid" else None)


class Recorder:
    """A `Call` that keeps name and arguments, and returns tensors of the documented shapes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, **arguments: Any) -> Any:
        self.calls.append((name, arguments))
        counts = torch.zeros(2, dtype=torch.int64)
        return {
            "npu_moe_distribute_dispatch_v2": (x(16, 1024), x(16), x(16 * 128), counts, x(4), x(0), x(16)),
            "npu_moe_distribute_combine_v2": x(4, 1024),
            "npu_grouped_matmul": [x(2, 16, 8)],
            "npu_dynamic_quant": (x(4, 16), x(4)),
            "npu_dequant_swiglu_quant": (x(4, 8), x(4)),
            "npu_moe_init_routing_v2": (x(8, 16), counts.repeat(4), counts, x(8)),
            "npu_moe_token_unpermute": x(4, 16),
            "npu_moe_gating_top_k": (x(4, 2), torch.zeros(4, 2, dtype=torch.int32), x(4, 32)),
        }[name]


def record() -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of every kind of call, in order."""
    recorder = Recorder()
    ranks = (
        patch.object(dist, "get_rank", lambda group=None: 0),
        patch.object(dist, "get_world_size", lambda group=None: 2),
    )
    with patch.object(npu, "call", recorder), ranks[0], ranks[1]:
        for series in ("A2", "A3"):
            for quantize in (False, True):
                run_dispatcher(recorder, series, quantize)
        offsets = torch.tensor([1, 4], dtype=torch.int32)
        grouped_mm_npu.forward(x(4, 16), x(2, 16, 8), offsets)
        grouped_mm_npu.weight_grad(x(4, 16), x(4, 8), offsets)
        quantize_npu.encode(x(4, 16), "int8")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            codes = [x(4, 16, dtype=torch.int8), x(4, dtype=torch.float32), x(2, 16, 8, dtype=torch.int8)]
            scaled_npu.forward(*codes, x(2, 8, dtype=torch.float32), offsets, dtype)
        swiglu_npu.forward(x(4, 16), "int8")
        run_routing()
    return recorder.calls
