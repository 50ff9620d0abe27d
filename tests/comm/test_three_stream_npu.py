"""The three-stream schedule as NPUs run it: over emulated operators of Ascend, and on stand-ins for NPU streams, which
tell who ran where and after what.

Legend: T tokens of a rank, K routes a token, D width, F hidden columns of an expert, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.comm.codec import Codec
from moeweave.comm.communicator import Communicator
from moeweave.comm.streams import DeviceStreams, OneStream
from moeweave.comm.three_stream import ThreeStream
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.kernels_ext.tolerance import SQNR_FLOOR, assert_close, sqnr
from moeweave.moe.experts import Experts, ExpertWeights, local_experts
from moeweave.moe.router import Router
from npu_local_emulator import an_npu
from run_ranks import run_ranks

BF16, DIM, EXPERTS, TOP_K = torch.bfloat16, 64, 8, 3
INT8 = Codec(dispatch="int8")
FORMS = {
    "gathered": ThreeStreamOptions("gathered", 0.0, codec=INT8, planes="collectives"),
    "prereduced": ThreeStreamOptions("gathered", 0.25, "prereduced", INT8, max_tokens=20, planes="collectives"),
    "routed": ThreeStreamOptions("routed", 0.5, codec=INT8),
}


class Layer:
    """Router, experts and shared expert of every rank, the same weights on all."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.router = Router(DIM, EXPERTS, TOP_K, kind="sigmoid").to(BF16)
        self.experts = Experts(DIM, 32, EXPERTS)
        for weight in (self.router.weight, self.experts.gate_up_proj, self.experts.down_proj):
            nn.init.normal_(weight, std=0.15)
        self.experts.to(BF16)
        self.log: list[tuple[str, str]] = []

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        self.log.append((current(), "router"))
        _, weights_TK, ids_TK = self.router(x_TD)
        return ids_TK, weights_TK

    def shared(self, x_TD: Tensor) -> Tensor:
        self.log.append((current(), "shared expert"))
        return torch.tanh(x_TD)

    def mine(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        self.log.append((current(), "experts"))
        per_rank = EXPERTS // dist.get_world_size()
        here = slice(dist.get_rank() * per_rank, (dist.get_rank() + 1) * per_rank)
        whole = self.experts.weights()
        weights = ExpertWeights(whole.gate_up[here], whole.down[here], whole.apply_gate)
        return local_experts(weights, rows_RD, offsets_e)

    def plain(self, x_TD: Tensor) -> Tensor:
        """In float32 on this rank alone, without any exchange."""
        ids_TK, weights_TK = self.choose(x_TD)
        return self.experts.float()(x_TD.float(), ids_TK, weights_TK) + torch.tanh(x_TD.float())


_STREAM: list[str] = ["compute"]  # of this process; the last one is current


def current() -> str:
    return _STREAM[-1]


class Npu:
    """As much of torch.npu as the schedule uses: streams run at once and log their order."""

    def __init__(self, log: list[tuple[str, str]]) -> None:
        self.log, self.made = log, 0

    def Stream(self, device: Any) -> Any:
        self.made += 1
        name = ("push", "dma")[self.made - 1]
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append((name, f"waits for {other.name}")),
            record_event=lambda: f"event of {name}",
        )

    def current_stream(self) -> Any:
        name = current()
        return SimpleNamespace(name=name, wait_event=lambda event: self.log.append((name, f"waits for {event}")))

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        _STREAM.append(stream.name)
        try:
            yield
        finally:
            _STREAM.pop()


def run(tokens: tuple[int, ...], form: str, emulated: bool, on_streams: bool) -> dict[str, Any]:
    layer, rank = Layer(), dist.get_rank()
    torch.manual_seed(11 + rank)
    x_TD = torch.randn(tokens[rank], DIM).to(BF16)
    groups = [dist.new_group(list(range(len(tokens)))) for _ in range(2)]
    names = {group.group_name: plane for group, plane in zip(groups, ("push", "dma"), strict=True)}
    own_gather = Communicator.all_gather

    def gather(comm: Communicator, x: Tensor, async_op: bool = False) -> Any:
        layer.log.append((current(), f"{x.dtype} over {names.get(comm.name)}"))
        return own_gather(comm, x, async_op=async_op)

    with (
        torch.no_grad(),
        an_npu() if emulated else nullcontext() as operators,
        patch.object(torch, "get_device_module", lambda device: Npu(layer.log)),
        patch.object(Communicator, "all_gather", gather),
    ):
        streams = DeviceStreams(torch.device("privateuseone:0")) if on_streams else OneStream()
        schedule = ThreeStream(*groups, EXPERTS, streams, FORMS[form], TOP_K)
        y_TD = schedule.layer(x_TD, layer.choose, layer.mine, layer.shared)
    with torch.no_grad():
        plain = layer.plain(x_TD)
    return dict(y_TD=y_TD, plain=plain, log=layer.log, operators=operators.names if operators else [])


SHARED_OUT = [(5, 17), (0, 7), (0, 0), (6, 1, 0, 11)]


@pytest.mark.parametrize("tokens", SHARED_OUT, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_over_emulated_operators_it_is_the_same_layer(form: str, tokens: tuple[int, ...]) -> None:
    wants = run_ranks(len(tokens), run, tokens, form, False, False)
    for found, want in zip(run_ranks(len(tokens), run, tokens, form, True, True), wants, strict=True):
        assert_close("y_TD", found["y_TD"], want["y_TD"], BF16)
        if found["y_TD"].numel():
            assert sqnr(found["y_TD"], found["plain"]) > SQNR_FLOOR["int8"][0] - 6.1
            assert {"npu_dynamic_quant", "npu_moe_gating_top_k"} <= set(found["operators"])
        if sum(tokens) and "npu_grouped_matmul" not in found["operators"]:
            assert form == "routed"  # a rank to which no row came
        assert want["operators"] == []


def test_rows_take_one_engine_scales_and_ids_the_other_and_the_router_neither() -> None:
    for found in run_ranks(2, run, (5, 17), "gathered", True, True):
        log = found["log"]
        where = {what: stream for stream, what in log if not what.startswith("waits")}
        assert where["router"] == where["shared expert"] == where["experts"] == "compute"
        assert where["torch.uint8 over dma"] == "dma"
        assert where["torch.float32 over push"] == where["torch.int64 over push"] == "push"
        assert ("push", "torch.uint8 over dma") not in log and ("dma", "torch.float32 over push") not in log
        order = [what for _, what in log]
        leave, ids = order.index("torch.uint8 over dma"), order.index("torch.int64 over push", order.index("router"))
        # Rows leave first; ids as soon as there are any; the shared expert runs beside both, the experts after both.
        assert leave < order.index("router") < ids < order.index("shared expert") < order.index("experts")
        assert ("dma", "waits for compute") in log[:leave] and ("push", "waits for compute") in log[:ids]
        joins = [place for place, entry in enumerate(log) if entry[0] == "compute" and "event of" in entry[1]]
        assert order.index("shared expert") < joins[0]
        before = {log[place][1] for place in joins if place < order.index("experts")}
        assert before == {"waits for event of push", "waits for event of dma"}
