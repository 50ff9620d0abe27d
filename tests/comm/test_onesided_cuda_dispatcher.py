"""The dispatcher over CUDA engines and its gradients: virtual ranks, on a GPU or emulated, against one autograd graph.

Experts multiply a row by a vector of their own, so that gradients of rows, weights and experts are all of interest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeweave.comm.codec import Codec
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.dispatchers.onesided_cuda import CudaOptions, OneSidedCudaDispatcher
from moeweave.comm.engines_cuda import open_engine
from moeweave.comm.onesided_launch import Budget
from moeweave.kernels_ext.tolerance import SQNR_FLOOR, assert_close, sqnr
from moeweave.parallel.recompute import replay_routing
from onesided_cases import Case, Inputs, Ranks, on_devices, on_devices_of, setup


def dispatchers_of(case: Case, **options: object) -> tuple[list[OneSidedCudaDispatcher], Ranks]:
    engines, ranks = setup(case)
    made = []
    for each in engines:
        given = each.launcher
        engine = open_engine(given.window, case.window, timeout=10.0, budget=given.budget, runtime=given.runtime)
        dispatcher = OneSidedCudaDispatcher(None, case.num_experts, "exact" if case.exact else "prereduced", **options)
        dispatcher._engine = engine
        made.append(dispatcher)
    return made, ranks


def backward(ranks: Ranks, case: Case, losses: list[Tensor]) -> None:
    """Of all ranks at once: one rank's kernels wait for another's."""
    if case.device == "cpu":
        ranks.run(lambda rank: losses[rank].backward())
    else:
        sum(losses).backward()


def apply_experts(scales_eD: Tensor, dispatched: Dispatched) -> Tensor:
    """Every row times its expert's vector; rows past the last are left out of every gradient."""
    rows_RD = dispatched.rows_RD
    place = torch.arange(rows_RD.shape[0], device=rows_RD.device)
    expert = torch.searchsorted(dispatched.offsets_e, place, right=True)
    valid = expert < scales_eD.shape[0]
    # Before anything is multiplied: what lies there may be NaN, and zero times NaN would reach the experts' gradients.
    used_RD = torch.where(valid[:, None], rows_RD, 0.0)
    return (used_RD.float() * scales_eD[expert.clamp(max=scales_eD.shape[0] - 1)]).to(rows_RD.dtype)


def plain(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, scales_ED: Tensor) -> Tensor:
    routed = (ids_TK >= 0) & (ids_TK < scales_ED.shape[0])
    per_route = x_TD.float()[:, None] * scales_ED[torch.where(routed, ids_TK, 0)]
    return (per_route * torch.where(routed, weights_TK, 0.0)[:, :, None]).sum(1)


CASES = [
    Case(tokens=(20, 64), num_experts=8, routing="holes"),
    Case(routing="holes", exact=True),
    Case(dtype=torch.float32, width=64, routing="spread"),
    Case(tokens=(0, 3, 0, 9), routing="hot"),
]


@on_devices_of("case", CASES, lambda case: case.dtype == torch.bfloat16)
@pytest.mark.parametrize("posted", [False, True], ids=["called", "posted"])
def test_gradients_against_one_graph(case: Case, posted: bool, device: str) -> None:
    room, case = case.world * case.max_tokens * case.top_k, replace(case, device=device)
    dispatchers, streams = dispatchers_of(case, options=CudaOptions(capacity=room))
    inputs, num_local = Inputs.of(case, 3), case.num_experts // case.world
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    scales_ED = torch.rand(case.num_experts, case.width, device=device) + 0.5
    xs, weights, mine = (
        list(map(leaf, inputs.xs)),
        list(map(leaf, inputs.weights)),
        list(map(leaf, scales_ED.split(num_local))),
    )
    probes = [torch.randn(x.shape, device=device) for x in xs]

    def forward(rank: int) -> Dispatched:
        arguments = xs[rank], inputs.ids[rank], weights[rank]
        return dispatchers[rank].dispatch_async(*arguments).wait() if posted else dispatchers[rank].dispatch(*arguments)

    arrived = streams.run(forward)
    made = streams.run(lambda rank: apply_experts(mine[rank], arrived[rank]))

    def back(rank: int) -> Tensor:
        arguments = made[rank], weights[rank], arrived[rank]
        return dispatchers[rank].combine_async(*arguments).wait() if posted else dispatchers[rank].combine(*arguments)

    ys = streams.run(back)
    backward(streams, case, [(y.float() * probe).sum() for y, probe in zip(ys, probes, strict=True)])
    want_x, want_w, want_s = list(map(leaf, inputs.xs)), list(map(leaf, inputs.weights)), leaf(scales_ED)
    want = [plain(x, ids, w, want_s) for x, ids, w in zip(want_x, inputs.ids, want_w, strict=True)]
    sum((y * probe).sum() for y, probe in zip(want, probes, strict=True)).backward()
    for rank in range(case.world):
        assert_close("y", ys[rank], want[rank].detach(), case.dtype)
        assert_close("x gradient", xs[rank].grad, want_x[rank].grad, case.dtype)
        assert_close("weights' gradient", weights[rank].grad, want_w[rank].grad, case.dtype)
        assert_close("experts' gradient", mine[rank].grad, want_s.grad.split(num_local)[rank], case.dtype)
        dispatchers[rank].check()


@on_devices_of("code", ["fp8", "int8"], lambda code: code == "fp8")
def test_codec_on_all_four_exchanges(code: str, device: str) -> None:
    case = Case(format=code, device=device)
    codec = Codec(dispatch=code, combine=code, dispatch_backward=code, combine_backward=code)
    dispatchers, streams = dispatchers_of(case, options=CudaOptions(capacity=2000), codec=codec)
    inputs = Inputs.of(case, 3)
    xs = [x.clone().requires_grad_() for x in inputs.xs]
    arrived = streams.run(lambda rank: dispatchers[rank].dispatch(xs[rank], inputs.ids[rank], inputs.weights[rank]))
    ys = streams.run(lambda r: dispatchers[r].combine(arrived[r].rows_RD, inputs.weights[r], arrived[r]))
    backward(streams, case, [y.float().sum() for y in ys])
    for rank in range(case.world):
        total = inputs.weights[rank].sum(1, keepdim=True)
        assert (
            sqnr(ys[rank], inputs.xs[rank].float() * total) > SQNR_FLOOR[code][0] - 6
        )  # of rows that were coded twice
        assert sqnr(xs[rank].grad, total.expand(-1, case.width)) > SQNR_FLOOR[code][0] - 6


@on_devices
def test_handle_is_reused(device: str) -> None:
    case = Case(routing="holes", device=device)
    dispatchers, streams = dispatchers_of(case, options=CudaOptions(capacity=2000))
    inputs = Inputs.of(case, 1)
    once = streams.run(lambda r: dispatchers[r].dispatch(inputs.xs[r], inputs.ids[r], inputs.weights[r]))
    again = streams.run(
        lambda r: dispatchers[r].dispatch(inputs.xs[r], inputs.ids[r], inputs.weights[r], handle=once[r].handle)
    )
    for first, second in zip(once, again, strict=True):
        end = int(first.offsets_e[-1])
        assert torch.equal(first.rows_RD[:end], second.rows_RD[:end])
        assert torch.equal(first.weights_R[:end], second.weights_R[:end])


@pytest.mark.gpu
def test_recomputation_sends_along_the_kept_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=(20,), num_experts=4)
    ([dispatcher], _), inputs = dispatchers_of(case), Inputs.of(case, 2)
    x_TD, engine, calls = inputs.xs[0].clone().requires_grad_(), dispatcher._engine, []

    def count(name: str) -> None:
        call = getattr(engine, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return call(*args, **options)

        monkeypatch.setattr(engine, name, counted)

    for name in ("plan", "dispatch", "resend"):
        count(name)

    def layer(x: Tensor) -> Tensor:
        arrived = dispatcher.dispatch(x, inputs.ids[0], inputs.weights[0])
        return dispatcher.combine(torch.sin(arrived.rows_RD), inputs.weights[0], arrived)

    def grads(y: Tensor) -> Tensor:
        return torch.autograd.grad(y.float().square().sum(), x_TD)[0]

    want = grads(layer(x_TD))
    calls.clear()
    got = grads(checkpoint(layer, x_TD, use_reentrant=False, context_fn=replay_routing))
    assert torch.equal(got, want)
    assert calls == ["dispatch", "plan", "resend"]


@pytest.mark.gpu
def test_budget_beyond_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_sms \(100000\) must be from 1 to \d+"):
        Budget.of(torch.device("cuda", 0), 100_000)
