"""What keeps the CUDA engine's rounds apart: room, counts, graphs, epochs, deadlines, and many random rounds."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_on_cpu import needs_gxx
from moeweave.comm.kernel_reports import OneSidedError
from moeweave.comm.onesided_cuda import CudaArrived, CudaEngine
from moeweave.comm.onesided_launch import Budget
from moeweave.comm.watchdog import watch
from moeweave.kernels_ext.onesided import EPOCHS, KINDS, MAX_BLOCKS, reference
from onesided_cases import (
    Case,
    Inputs,
    Ranks,
    check_dispatch,
    dispatched,
    experts,
    on_devices,
    on_devices_of,
    poison,
    round_trip,
    setup,
    synchronize,
)


def combined(engines: list[CudaEngine], streams: Ranks, arrived: list[CudaArrived]) -> list[Tensor]:
    """The rows as they arrived, weighted and summed."""
    return streams.run(lambda r: engines[r].combine(arrived[r].rows_RD, arrived[r].weights_R, arrived[r].moves))


@on_devices
def test_overflow_is_counted_and_dropped(device: str) -> None:
    case, room = Case(exact=True, device=device), 40
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    arrived = streams.run(
        lambda rank: engines[rank].dispatch(inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], capacity=room)
    )
    synchronize(case)
    kept = []
    for rank, got in enumerate(arrived):
        rows, weights, ends = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank)
        assert torch.equal(got.rows_RD, rows[:room])
        assert torch.equal(got.moves.offsets_e, ends.clamp(max=room))
        assert engines[rank].launcher.num_dropped == len(rows) - room > 0
        made = experts(rows)
        made[room:] = 0
        kept.append((made, weights))
    for exact in (False, True):

        def call(rank: int, exact: bool = exact) -> Tensor:
            weights = inputs.weights[rank] if exact else arrived[rank].weights_R
            return engines[rank].combine(kept[rank][0][:room].clone(), weights, arrived[rank].moves, exact=exact)

        got_y = streams.run(call)
        made, weights_R = [made for made, _ in kept], [weights for _, weights in kept]
        if exact:
            want = reference.combine_exact(made, inputs.weights, inputs.ids, case.num_experts)
        else:
            want = reference.combine(made, weights_R, inputs.ids, case.num_experts)
        assert all(map(torch.equal, got_y, want))


@on_devices
def test_plan_tells_the_exact_number_of_rows(device: str) -> None:
    case = Case(routing="holes", device=device)
    engines, streams = setup(case)
    for seed in range(3):
        inputs = Inputs.of(case, seed)
        got = streams.run_waiting(lambda rank, inputs=inputs: engines[rank].plan(inputs.ids[rank]))
        want = [int(reference.rows_of_routes(inputs.ids, case.num_experts, rank)[1][-1]) for rank in range(case.world)]
        assert got == want


@pytest.mark.gpu
def test_graph_replays_with_other_routing() -> None:
    case = Case(tokens=(64, 20, 64, 3), routing="spread")
    engines, streams = setup(case)
    inputs = Inputs.of(case)

    def step() -> tuple[list[CudaArrived], list[Tensor]]:
        arrived = dispatched(case, engines, streams, inputs)
        made = [experts(each.rows_RD) for each in arrived]
        return arrived, streams.run(lambda r: engines[r].combine(made[r], arrived[r].weights_R, arrived[r].moves))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arrived, ys = step()
    for seed in range(1, 20):
        fresh = Inputs.of(replace(case, routing="holes" if seed % 3 else "spread"), seed)
        for kept, new in zip(
            inputs.xs + inputs.ids + inputs.weights, fresh.xs + fresh.ids + fresh.weights, strict=True
        ):
            kept.copy_(new)
        poison(engines)
        graph.replay()
        expected = check_dispatch(case, arrived, inputs)
        made, weights = [experts(rows) for rows, _ in expected], [weights for _, weights in expected]
        want = reference.combine(made, weights, inputs.ids, case.num_experts)
        assert all(map(torch.equal, ys, want))
    for engine in engines:
        engine.launcher.check()


@on_devices
def test_epochs_wrap(device: str) -> None:
    case = Case(device=device)
    engines, streams = setup(case)
    for engine in engines:
        engine.launcher.state[EPOCHS : EPOCHS + 2 * KINDS * MAX_BLOCKS] = -3
        first = engine.map.starts["acks"]
        engine.launcher.window.memory[first : first + 8 * KINDS * case.world].view(torch.int64).fill_(-3 << 32)
    for seed in range(6):
        round_trip(case, engines, streams, Inputs.of(case, seed))
    assert int(engines[0].launcher.state[EPOCHS]) == 3


@pytest.mark.gpu
def test_two_engines_at_once_do_not_interfere() -> None:
    case = Case(tokens=(30, 64), max_tokens=64)
    budget = Budget(12, 12)
    pairs = [setup(case, budget=budget) for _ in range(2)]
    inputs = [Inputs.of(case, seed) for seed in range(2)]
    sides = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        arrived = []
        for side, (engines, streams), each in zip(sides, pairs, inputs, strict=True):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                arrived.append(dispatched(case, engines, streams, each))
        torch.cuda.synchronize()
        for got, each in zip(arrived, inputs, strict=True):
            check_dispatch(case, got, each)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize(
    "device, graphed",
    [
        pytest.param("cpu", False, marks=needs_gxx),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
)
def test_an_absent_rank_ends_in_an_error(operation: str, device: str, graphed: bool) -> None:
    case = Case(tokens=(16, 16, 16), num_experts=12, device=device)
    engines, streams = setup(case, timeout=0.5)
    inputs = Inputs.of(case)
    arrived = dispatched(case, engines, streams, inputs)

    def step(rank: int) -> Tensor:
        if operation == "combine":
            return engines[rank].combine(arrived[rank].rows_RD, arrived[rank].weights_R, arrived[rank].moves)
        return engines[rank].dispatch(inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], capacity=200).rows_RD

    streams.run(step)
    synchronize(case)
    alive = (0, 2)  # rank 1 is gone
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = streams.run(step, alive)
        graph.replay()
    else:
        outputs = streams.run(step, alive)
    synchronize(case)
    for output in outputs:
        assert output.isnan().all()
    for rank in alive:
        with pytest.raises(OneSidedError, match=rf"rank {rank} of 3: {operation} waited 0.5 s for the .* of rank 1"):
            engines[rank].launcher.check()
        with pytest.raises(OneSidedError):
            step(rank)


@on_devices
def test_a_sender_that_gives_up_spoils_what_has_arrived(device: str) -> None:
    """Rank 0's tokens stay at home, so that all of their rows are there; only its senders wait for rank 1."""
    case = Case(tokens=(64, 64), device=device)
    engines, streams = setup(case, timeout=0.5)
    inputs = Inputs.of(case)
    inputs.ids = [ids % 8 + 8 * rank for rank, ids in enumerate(inputs.ids)]
    arrived = dispatched(case, engines, streams, inputs)
    combined(engines, streams, arrived)
    synchronize(case)
    [y] = streams.run(lambda r: engines[r].combine(arrived[r].rows_RD, arrived[r].weights_R, arrived[r].moves), [0])
    synchronize(case)
    assert y.isnan().all()
    with pytest.raises(OneSidedError, match=r"combine waited 0.5 s for the acknowledgement .* of rank 1"):
        engines[0].launcher.check()


@on_devices
def test_launches_behind_a_failed_one_give_nan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch and a combine of the same epoch, both launched before the host could see the failure."""
    case = Case(tokens=(16, 16), device=device)
    engines, streams = setup(case, timeout=0.5)
    inputs = Inputs.of(case)
    arrived = dispatched(case, engines, streams, inputs)
    combined(engines, streams, arrived)
    synchronize(case)
    monkeypatch.setattr(engines[0].launcher, "check", lambda: None)

    def step(rank: int) -> tuple[Tensor, Tensor]:
        again = engines[rank].dispatch(inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], capacity=200)
        return again.rows_RD, engines[rank].combine(arrived[rank].rows_RD, arrived[rank].weights_R, arrived[rank].moves)

    [(rows, y)] = streams.run(step, [0])  # rank 1 is gone
    synchronize(case)
    assert rows.isnan().all()
    assert y.isnan().all()


ROUNDS = {"cpu": 12, "cuda": 700}


@on_devices_of("world", [2, 4, 8], lambda world: world == 4)
def test_many_random_rounds(world: int, device: str) -> None:
    case = Case(tokens=(48,) * world, num_experts=8 * world, top_k=6, width=128, max_tokens=48, device=device)
    engines, streams = setup(case)
    bad = torch.zeros((), dtype=torch.int64, device=device)
    g = torch.Generator().manual_seed(world)
    for seed in range(ROUNDS[device]):
        tokens = tuple(torch.randint(0, 49, (world,), generator=g).tolist())
        now = replace(case, tokens=tokens, routing=("spread", "holes", "holes")[seed % 3])
        inputs = Inputs.of(now, seed)
        arrived = dispatched(now, engines, streams, inputs)
        ys = combined(engines, streams, arrived)
        expected = [
            reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank) for rank in range(world)
        ]
        want = reference.combine([e[0] for e in expected], [e[1] for e in expected], inputs.ids, case.num_experts)
        for rank in range(world):
            rows = expected[rank][0]
            bad += (arrived[rank].rows_RD[: len(rows)] != rows).sum() + (ys[rank] != want[rank]).sum()
            bad += (arrived[rank].moves.offsets_e != expected[rank][2]).sum()
    assert int(bad) == 0
    for engine in engines:
        engine.launcher.check()


@pytest.mark.gpu
def test_the_watchdog_raises_while_only_graphs_are_replayed() -> None:
    case = Case(tokens=(16, 16, 16), num_experts=12)
    engines, streams = setup(case, timeout=0.5)
    inputs = Inputs.of(case)
    dispatched(case, engines, streams, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()

    def step(rank: int) -> CudaArrived:
        given = inputs.xs, inputs.ids, inputs.weights
        return engines[rank].dispatch(*(each[rank] for each in given), capacity=200)

    with torch.cuda.graph(graph):
        streams.run(step, (0, 2))  # rank 1 is gone
    watch(engines[0].launcher, grace=0.2)

    def replay(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            graph.replay()
            torch.cuda.synchronize()

    with pytest.raises(OneSidedError, match=r"rank 0 of 3: dispatch waited 0.5 s for the .* of rank 1"):
        replay(20)


@pytest.mark.gpu
@pytest.mark.slow
def test_ten_thousand_rounds() -> None:
    """Random sizes and routings. Every sum is exact in these numbers: a result is its token times the weights' sum."""
    world, room, g = 4, 48, torch.Generator().manual_seed(1)
    case = Case(tokens=(room,) * world, num_experts=8 * world, top_k=6, width=64, max_tokens=room, routing="holes")
    engines, streams = setup(case)
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    for seed in range(10_000):
        now = replace(case, tokens=tuple(torch.randint(0, room + 1, (world,), generator=g).tolist()))
        inputs = Inputs.of(now, seed)
        inputs.xs = [(x * 4).round().clamp(-8, 8) for x in inputs.xs]
        inputs.weights = [torch.exp2((w * 3).floor() - 1) for w in inputs.weights]
        arrived = dispatched(now, engines, streams, inputs)
        ys, rank = combined(engines, streams, arrived), seed % world
        rows, weights, ends = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank)
        bad += (arrived[rank].rows_RD[: len(rows)] != rows).sum() + (arrived[rank].moves.offsets_e != ends).sum()
        bad += (arrived[rank].weights_R[: len(rows)] != weights).sum()
        for x, ids, w, y in zip(inputs.xs, inputs.ids, inputs.weights, ys, strict=True):
            routed = (ids >= 0) & (ids < case.num_experts)
            bad += (y.float() != x.float() * (w * routed).sum(1, keepdim=True)).sum()
    assert int(bad) == 0
    for engine in engines:
        engine.launcher.check()
