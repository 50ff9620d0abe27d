"""Chunks and lanes: the values of one piece, turns in one order and mirrored in backward, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm import rounds
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.exchange import Exchange
from moeweave.comm.overlap import hand_over, in_lane, run_lanes, run_routed
from moeweave.comm.pending import Pending
from moeweave.comm.timeline import Timeline, exposed
from moeweave.kernels_ext.tolerance import assert_close
from nan_empty import nan_empty
from plain_moe import Case, ids_of, leaves_of, plain, probe_of, run_experts
from run_ranks import run_ranks

CASES = [
    Case((5, 17), top_k=2),
    Case((0, 7), routing="holes"),
    Case((0, 0)),
    Case((9, 4), routing="hot", top_k=3),
    Case((6, 1, 0, 11), routing="holes", top_k=4, dtype=torch.bfloat16),
]


def dispatcher_of(case: Case, name: str):
    """`name` is a dispatcher, or a dispatcher and its way back."""
    group = dist.group.WORLD
    return_group = dist.new_group(list(range(case.world)))
    name, _, combine = name.partition(" ")
    return make_dispatcher(
        name, group, case.num_experts, top_k=case.top_k, combine=combine or None, return_group=return_group
    )


def chunked(case: Case, name: str, num_chunks: int) -> list[Tensor]:
    dispatcher = dispatcher_of(case, name)
    x_TD, weights_TK, mine = leaves_of(case, dist.get_rank())
    with nan_empty():
        y_TD = run_routed(
            dispatcher,
            x_TD,
            ids_of(case, dist.get_rank()),
            weights_TK,
            lambda rows, offsets: run_experts(mine, rows, offsets),
            num_chunks,
        )
        y_TD.backward(probe_of(case, dist.get_rank()))
    return [y_TD.detach(), x_TD.grad, weights_TK.grad, mine.grad]


@pytest.mark.parametrize("name", ["alltoall", "allgather", "onesided", "onesided exact"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunks_change_no_bit_of_output_and_token_gradients(case: Case, name: str) -> None:
    """The experts' own gradient is a sum over chunks, so it is equal to rounding only."""
    whole, three = (run_ranks(case.world, chunked, case, name, n) for n in (1, 3))
    answers, per_rank = plain(case), case.num_experts // case.world
    for rank, (one, cut) in enumerate(zip(whole, three, strict=True)):
        for got, want in zip(cut[:3], one[:3], strict=True):
            assert torch.equal(got, want)
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        for got, want in zip(
            cut, (answers[rank].y_TD, answers[rank].grad_x_TD, answers[rank].grad_weights_TK), strict=False
        ):
            assert_close(f"rank {rank}", got, want, case.dtype)
        assert_close(f"rank {rank}", cut[3], answers[rank].grad_experts[mine], case.dtype)


def two_layers(case: Case, name: str, as_lanes: bool) -> tuple[list[Tensor], list[str]]:
    """Two layers on two micro-batches; the experts' passes in order, in both directions."""
    dispatcher, order = dispatcher_of(case, name), []

    def task(lane: int, x_TD: Tensor, weights_TK: Tensor, mine: Tensor) -> Tensor:
        def experts(layer: int, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
            order.append(f"lane {lane} layer {layer}")
            rows_RD.register_hook(lambda _: order.append(f"lane {lane} layer {layer} backward"))
            return run_experts(mine, rows_RD, offsets_e)

        ids_TK = ids_of(case, dist.get_rank())
        for layer in range(2):
            x_TD = x_TD + run_routed(dispatcher, x_TD, ids_TK, weights_TK, lambda *rows, n=layer: experts(n, *rows))
        return x_TD

    sets = [leaves_of(case, dist.get_rank()), leaves_of(case, dist.get_rank(), 1)]
    tasks = [lambda lane=lane, leaf=leaf: task(lane, *leaf) for lane, leaf in enumerate(sets)]
    outputs = run_lanes(tasks) if as_lanes else [each() for each in tasks]
    probe_TD = probe_of(case, dist.get_rank())
    torch.autograd.backward(outputs, [probe_TD] * 2)
    return [*(y.detach() for y in outputs), *(leaf.grad for leafs in sets for leaf in leafs)], order


@pytest.mark.parametrize("name", ["alltoall", "onesided", "onesided exact"])
@pytest.mark.parametrize("case", [Case((5, 8), top_k=2), Case((0, 3, 4, 1))], ids=lambda case: case.name)
def test_two_layers_in_flight(case: Case, name: str) -> None:
    in_turns, in_order = (run_ranks(case.world, two_layers, case, name, as_lanes) for as_lanes in (True, False))
    forward = [f"lane {lane} layer {layer}" for layer in range(2) for lane in range(2)]
    for (found, order), (want, _) in zip(in_turns, in_order, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert order[:4] == forward
        assert order[4:] == [f"{name} backward" for name in reversed(forward)], "backward takes the turns in reverse"


def test_lanes_take_turns_and_end() -> None:
    before, order = threading.active_count(), []

    def task(name: str, turns: int) -> str:
        assert in_lane() and not torch.is_grad_enabled()
        for turn in range(turns):
            order.append(f"{name}{turn}")
            hand_over(Pending.ready(None))
        return name

    with torch.no_grad():
        tasks = [lambda: task("a", 3), lambda: task("b", 1), lambda: task("c", 2)]
        assert run_lanes(tasks) == ["a", "b", "c"]
    assert order == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert threading.active_count() == before and not in_lane()


def test_a_failing_lane_ends_the_others() -> None:
    before, went_on = threading.active_count(), []

    def waits() -> None:
        hand_over(Pending.ready(None))
        went_on.append(True)

    def fails() -> None:
        raise ValueError("lane 1 is at fault")

    with pytest.raises(ValueError, match="lane 1 is at fault"):
        run_lanes([waits, fails, waits])
    assert not went_on and threading.active_count() == before


class Holder:
    """State that each lane has for itself."""

    def __init__(self) -> None:
        self.value = "start"

    def save(self) -> str:
        return self.value

    def restore(self, saved: str) -> None:
        self.value = saved


def test_state_of_a_lane() -> None:
    holder = Holder()

    def task(name: str) -> tuple[str, str]:
        first, holder.value = holder.value, name
        hand_over(Pending.ready(None))
        return first, holder.value

    assert run_lanes([lambda: task("a"), lambda: task("b")], [holder]) == [("start", "a"), ("start", "b")]


def timed_chunks(case: Case) -> list[str]:
    timeline = Timeline()
    x_TD, weights_TK, mine = leaves_of(case, dist.get_rank())
    routed = (dispatcher_of(case, "alltoall"), x_TD, ids_of(case, dist.get_rank()), weights_TK)
    run_routed(*routed, lambda rows, offsets: run_experts(mine, rows, offsets), 2, timeline)
    spans = {span.name: span for span in timeline.spans()}
    assert exposed(list(spans.values())) > 0
    events = [(span.start, f"{name} begins") for name, span in spans.items()]
    events += [(span.end, f"{name} ends") for name, span in spans.items()]
    return [name for _, name in sorted(events)]


def backward_of_chunks(case: Case, name: str, exchange: type, join_name: str) -> list[str]:
    """What backward does, in order: exchanges posted and joined, experts' passes."""
    x_TD, weights_TK, mine = leaves_of(case, dist.get_rank())
    order: list[str] = []

    def experts(rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        rows_RD.register_hook(lambda _: order.append("experts"))
        return run_experts(mine, rows_RD, offsets_e)

    dispatcher = dispatcher_of(case, name)
    y_TD = run_routed(dispatcher, x_TD, ids_of(case, dist.get_rank()), weights_TK, experts, 2)
    post, join = exchange.post, getattr(exchange, join_name)

    def noted(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: (order.append(name), own(self, *args))[1]

    with (
        mock.patch.object(exchange, "post", noted("post", post)),
        mock.patch.object(exchange, join_name, noted("join", join)),
    ):
        y_TD.sum().backward()
    return order


@pytest.mark.parametrize(
    "name, exchange, join_name", [("alltoall", Exchange, "join"), ("onesided exact", rounds.Exchange, "_finish")]
)
def test_backward_of_chunks_is_overlapped_too(name: str, exchange: type, join_name: str) -> None:
    """Both combines' gradients leave first; the first chunk's experts run while the second's rows go back."""
    want = ["post", "post", "join", "experts", "post", "join", "experts", "post", "join", "join"]
    assert run_ranks(2, backward_of_chunks, Case((8, 8)), name, exchange, join_name) == [want, want]


def test_order_of_chunks() -> None:
    for order in run_ranks(2, timed_chunks, Case((8, 8))):
        at = order.index
        assert at("dispatch 1 begins") < at("experts 0 begins") < at("dispatch 1 ends")
        assert at("combine 0 begins") < at("experts 1 begins") < at("experts 1 ends") < at("combine 0 ends")
