"""Streams, lanes and the three-stream schedule on one GPU: the same values as on one stream, and work on three."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.overlap import in_lane, run_lanes, run_routed
from moeweave.comm.pending import Pending
from moeweave.comm.streams import DeviceStreams, make_streams
from moeweave.comm.three_stream import ThreeStream
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.comm.timeline import Timeline
from moeweave.moe.experts import Experts, local_experts
from moeweave.moe.layer import SharedExperts
from moeweave.moe.router import Router

pytestmark = pytest.mark.gpu

NUM_EXPERTS, DIM = 8, 512


def parts() -> tuple[Router, Experts, SharedExperts, Tensor]:
    router, experts = Router(DIM, NUM_EXPERTS, 2), Experts(DIM, 256, NUM_EXPERTS)
    made = [module.to("cuda", torch.bfloat16) for module in (router, experts, SharedExperts(DIM, 1024))]
    return *made, torch.randn(2048, DIM, device="cuda", dtype=torch.bfloat16)  # type: ignore[return-value]


def layer(schedule: ThreeStream, made: tuple[Any, ...], x_TD: Tensor) -> list[Tensor]:
    router, experts, shared, _ = made
    x_TD = x_TD.clone().requires_grad_()

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        _, weights_TK, ids_TK = router(x)
        return ids_TK, weights_TK

    y_TD = schedule.layer(x_TD, route, lambda *rows: local_experts(experts.weights(), *rows, exact=True), shared)
    y_TD.backward(torch.ones_like(y_TD))
    grads = [param.grad.clone() for module in (router, experts) for param in module.parameters()]
    for module in (router, experts, shared):
        module.zero_grad()
    return [y_TD.detach(), x_TD.grad, *grads]


@pytest.mark.parametrize("form", ["gathered", "routed"])
@pytest.mark.parametrize("codec", ["none", "fp8", "int8"])
def test_three_streams_give_the_values_of_one(form: str, codec: str) -> None:
    made, options = parts(), ThreeStreamOptions(form, 0.3, codec=Codec.parse(codec))
    overlapped = ThreeStream(None, None, NUM_EXPERTS, make_streams("cuda"), options, 2)
    plain = ThreeStream(None, None, NUM_EXPERTS, make_streams("cuda", overlap=False), options, 2)
    want = layer(plain, made, made[3])
    for _ in range(20):  # a missing event shows only now and then
        noise = torch.randn(1 << 22, device="cuda").sort()  # keeps the compute stream busy
        found = layer(overlapped, made, made[3])
        del noise
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_graph_replay() -> None:
    """Decoding in fixed sizes, captured: the values of the eager pass on other tokens."""
    router, experts, shared, x_TD = parts()
    options = ThreeStreamOptions("gathered", 0.3, "prereduced", Codec.parse("fp8"), max_tokens=160)
    schedule = ThreeStream(None, None, NUM_EXPERTS, make_streams("cuda"), options, 2)

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        _, weights_TK, ids_TK = router(x)
        return ids_TK, weights_TK

    def run(x: Tensor) -> Tensor:
        return schedule.layer(x, route, lambda *rows: local_experts(experts.weights(), *rows), shared)

    with torch.no_grad():
        held = x_TD[:128].clone()
        run(held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_TD = run(held)
        for start in (128, 512):
            want = run(x_TD[start : start + 128])
            held.copy_(x_TD[start : start + 128])
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y_TD, want)


def test_planes_are_streams_of_their_own() -> None:
    timeline = Timeline("cuda")
    streams = DeviceStreams(torch.device("cuda"), timeline)
    ran: dict[str, Any] = {}

    def post(plane: str) -> Pending[Tensor]:
        ran[plane] = torch.cuda.current_stream()
        torch.cuda._sleep(20_000_000)
        return Pending.ready(torch.ones(4, device="cuda"))

    pending = [streams.start(plane, plane, lambda plane=plane: post(plane)) for plane in ("push", "dma")]
    assert len({stream.cuda_stream for stream in (*ran.values(), torch.cuda.current_stream())}) == 3
    assert all(bool((each.wait() == 1).all()) for each in pending)
    push, dma = timeline.spans()
    assert dma.start < push.end, "the planes ran at the same time"


def test_lanes_compute_on_the_callers_stream() -> None:
    router, experts, _, x_TD = parts()
    dispatcher = make_dispatcher("alltoall", None, NUM_EXPERTS)
    mine = torch.cuda.Stream()

    def task(part: Tensor) -> Tensor:
        assert in_lane() and torch.cuda.current_stream() == mine
        _, weights_TK, ids_TK = router(part)
        return run_routed(
            dispatcher,
            part,
            ids_TK,
            weights_TK,
            lambda *rows: local_experts(experts.weights(), *rows, exact=True),
        )

    mine.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(mine):
        halves = [half.clone().requires_grad_() for half in x_TD.chunk(2)]
        in_turns = run_lanes([lambda half=half: task(half) for half in halves])
        sum(y.float().sum() for y in in_turns).backward()
        grads = [half.grad.clone() for half in halves]
        plain = run_lanes([lambda: run_lanes_of_one(router, experts, dispatcher, halves[0])])
    torch.cuda.synchronize()
    assert torch.equal(in_turns[0], plain[0])
    assert all(bool(grad.isfinite().all()) for grad in grads)


def run_lanes_of_one(router: Router, experts: Experts, dispatcher: Any, part: Tensor) -> Tensor:
    _, weights_TK, ids_TK = router(part)
    arrived = dispatcher.dispatch(part, ids_TK, weights_TK)
    rows_RD = local_experts(experts.weights(), arrived.rows_RD, arrived.offsets_e, exact=True)
    return dispatcher.combine(rows_RD, weights_TK, arrived)
