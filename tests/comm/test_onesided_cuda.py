"""The CUDA engine with virtual ranks on one GPU, against the reference in plain PyTorch.

Rows that were moved, exact sums and prereduced sums are equal bit for bit; what goes through a codec equals the codec's
own encode and decode; dot products are within the table.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.comm.codec import decode_rows, encode_rows, wire_width
from moeweave.comm.onesided_cuda import Budget, CudaArrived, CudaEngine, OneSidedError
from moeweave.comm.windows_cuda import WindowMap
from moeweave.kernels_ext.onesided import reference
from moeweave.kernels_ext.tolerance import assert_close, sqnr

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...] = (37, 64, 1, 50)
    width: int = 512
    num_experts: int = 16
    top_k: int = 4
    max_tokens: int = 64
    dtype: torch.dtype = torch.bfloat16
    routing: str = "spread"
    format: str = "none"
    scale: str = "token"
    exact: bool = False
    align: int = 1

    @property
    def world(self) -> int:
        return len(self.tokens)

    @property
    def window(self) -> WindowMap:
        row = self.width * self.dtype.itemsize
        return WindowMap(
            size=self.world, num_experts=self.num_experts, top_k=self.top_k, max_tokens=self.max_tokens,
            row_bytes=max(row, wire_width(self.format, self.scale, self.width, self.dtype)), back_bytes=row + 256,
            exact=self.exact,
        )  # fmt: skip

    def coded(self, rows: Tensor) -> Tensor:
        """As on the link, by the CPU: there a division by a number is one; on CUDA, torch multiplies by a reciprocal."""
        return self.decoded(rows).to(rows.dtype)

    def decoded(self, rows: Tensor) -> Tensor:
        """`coded` before it is rounded, float32."""
        if self.format == "none":
            return rows.float()
        wire = encode_rows(rows.cpu(), self.format, self.scale)
        return decode_rows(wire, self.format, self.scale, rows.shape[1], torch.float32).to(rows.device)


def routing(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    shape = case.tokens[rank], case.top_k
    if case.routing == "hot":  # one expert for everybody, and nothing else
        ids = torch.full(shape, -1, device="cuda", dtype=torch.int64)
        ids[:, 0] = case.num_experts - 1
        return ids
    scores = torch.rand(shape[0], case.num_experts, device="cuda", generator=generator)
    ids = scores.topk(case.top_k, dim=1).indices
    if case.routing == "holes":
        holes = torch.rand(shape, device="cuda", generator=generator)
        ids = torch.where(holes < 0.4, -1, torch.where(holes > 0.9, case.num_experts + 3, ids))
    return torch.full_like(ids, -1) if case.routing == "none" else ids


@dataclass
class Inputs:
    xs: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Inputs:
        g = torch.Generator("cuda").manual_seed(seed)
        ranks = range(case.world)
        xs = [torch.randn(case.tokens[r], case.width, device="cuda", generator=g).to(case.dtype) for r in ranks]
        weights = [torch.rand(case.tokens[r], case.top_k, device="cuda", generator=g) for r in ranks]
        return cls(xs, [routing(case, r, g) for r in ranks], weights)


def from_virtual() -> Any:
    import virtual_ranks

    return virtual_ranks


def poison(engines: list[CudaEngine]) -> None:
    """Rows and records of all windows become NaN; only cells keep their epochs."""
    for engine in engines:
        first, last = engine.map.starts["meta"], engine.map.starts["end"]
        engine._window.memory[first:last].fill_(255)


def dispatched(
    case: Case, engines: list[CudaEngine], streams: Any, inputs: Inputs, **options: Any
) -> list[CudaArrived]:
    def call(rank: int) -> CudaArrived:
        return engines[rank].dispatch(
            inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], format=case.format, scale=case.scale,
            capacity=engines[rank].worst_capacity() + case.align * case.num_experts, align=case.align, **options,
        )  # fmt: skip

    return streams.run(call)


def check_dispatch(case: Case, arrived: list[CudaArrived], inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Compare, and return the expected rows and weights of every rank."""
    expected = []
    for rank, got in enumerate(arrived):
        rows, weights, ends = reference.dispatch(
            inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank, case.coded
        )
        assert torch.equal(got.moves.offsets_e, ends)
        assert torch.equal(got.rows_RD[: rows.shape[0]], rows), f"rows of rank {rank}"
        assert torch.equal(got.weights_R[: rows.shape[0]], weights), f"weights of rank {rank}"
        expected.append((rows, weights))
    return expected


def experts(rows: Tensor, scale: float = 1.5) -> Tensor:
    """Stands for the experts: other numbers than were sent, a row at a time."""
    return (rows.float() * scale + 0.25).to(rows.dtype)


def round_trip(case: Case, engines: list[CudaEngine], streams: Any, inputs: Inputs) -> dict[str, list[Tensor]]:
    arrived = dispatched(case, engines, streams, inputs)
    expected = check_dispatch(case, arrived, inputs)
    made, weights_R = [experts(rows) for rows, _ in expected], [weights for _, weights in expected]
    padded = [torch.full_like(got.rows_RD, float("nan")) for got in arrived]  # past the last row: must reach nothing
    for whole, rows in zip(padded, made, strict=True):
        whole[: rows.shape[0]] = rows
    wire = dict(format=case.format, scale=case.scale)

    def back(rank: int, weighted: bool, exact: bool) -> Tensor:
        weights = (inputs.weights[rank] if exact else arrived[rank].weights_R) if weighted else None
        return engines[rank].combine(padded[rank], weights, arrived[rank].moves, exact=exact, **wire)

    results = {}
    for weighted, exact in itertools.product((True, False), (False, True) if case.exact else (False,)):
        got = streams.run(lambda rank: back(rank, weighted, exact))
        if exact:
            want = reference.combine_exact(
                made, inputs.weights if weighted else None, inputs.ids, case.num_experts, case.decoded
            )
        else:
            all_weights = weights_R if weighted else [None] * case.world
            want = reference.combine(made, all_weights, inputs.ids, case.num_experts, case.decoded)
        for rank in range(case.world):
            assert torch.equal(got[rank], want[rank]), f"combine of rank {rank}, weighted {weighted}, exact {exact}"
        results[f"{weighted}{exact}"] = got
    for engine in engines:
        engine.check()
    return results


def setup(case: Case, **options: Any) -> tuple[list[CudaEngine], Any]:
    virtual = from_virtual()
    return virtual.virtual_engines(case.window, **options), virtual.Streams(case.world)


CASES = [
    Case(),
    Case(routing="holes", exact=True),
    Case(routing="hot"),
    Case(routing="none"),
    Case(tokens=(0, 0, 0, 0)),
    Case(tokens=(0, 7)),
    Case(tokens=(1,), num_experts=4),
    Case(tokens=(33, 12), width=7168, top_k=8, num_experts=64, exact=True),
    Case(tokens=(5, 9, 40, 64, 1, 0, 17, 63), num_experts=64, top_k=8),
    Case(tokens=(3, 4), top_k=1, num_experts=2, exact=True),
    Case(tokens=(3, 4), top_k=16, num_experts=32),
    Case(tokens=(700, 1000, 3, 512), max_tokens=1000, width=264),
    Case(tokens=(700, 1000), max_tokens=9000, width=8, exact=True),
    Case(dtype=torch.float32, width=132, exact=True),
    Case(dtype=torch.float16, exact=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip(case: Case) -> None:
    engines, streams = setup(case)
    for seed in range(3):
        poison(engines)
        round_trip(case, engines, streams, Inputs.of(case, seed))


CODED = [("fp8", "token"), ("fp8", "group128"), ("int8", "token"), ("fp8_e5m2", "token"), ("fp8_e5m2", "group128")]
SQNR_FLOOR = {"fp8": 25.0, "int8": 30.0, "fp8_e5m2": 19.0}  # dB, of normal rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format, scale", CODED)
def test_codec(format: str, scale: str, dtype: torch.dtype) -> None:
    case = Case(tokens=(37, 64, 0, 50), width=640, format=format, scale=scale, dtype=dtype, exact=True, routing="holes")
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    inputs.xs[0][3] = 0.0
    inputs.xs[1][5] *= 1e-3
    round_trip(case, engines, streams, inputs)
    assert sqnr(case.coded(inputs.xs[1]), inputs.xs[1]) > SQNR_FLOOR[format]


def test_not_finite_rows_arrive_as_nan() -> None:
    case = Case(tokens=(8, 8), format="fp8", routing="spread")
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    inputs.xs[0][2, 7], inputs.xs[1][3, 100] = float("nan"), float("inf")
    arrived = dispatched(case, engines, streams, inputs)
    for rank, got in enumerate(arrived):
        rows, _, _ = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank, case.coded)
        assert torch.equal(got.rows_RD[: len(rows)].isnan(), rows.isnan())
        assert rows.isnan().all(1).any()


@pytest.mark.parametrize("format, scale", [("fp8", "token"), ("fp8", "group128"), ("int8", "token")])
def test_raw_rows_keep_their_codes(format: str, scale: str) -> None:
    case = Case(width=640, format=format, scale=scale)
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    for rank, got in enumerate(dispatched(case, engines, streams, inputs, raw=True)):
        rows, _, _ = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank, case.coded)
        assert got.scales_RG is not None
        groups = got.scales_RG.shape[1]
        grouped = got.rows_RD[: len(rows)].float().view(len(rows), groups, -1) * got.scales_RG[: len(rows), :, None]
        assert torch.equal(grouped.view(len(rows), -1).to(case.dtype), rows)


@pytest.mark.parametrize("format", ["none", "fp8_e5m2"])
@pytest.mark.parametrize("routed", ["spread", "holes"])
def test_gradients(routed: str, format: str) -> None:
    case = Case(routing=routed)
    engines, streams = setup(case)
    for seed in range(2):
        inputs, other = Inputs.of(case, seed), Inputs.of(case, seed + 7)
        arrived = dispatched(case, engines, streams, inputs)
        expected = check_dispatch(case, arrived, inputs)
        coded = replace(case, format=format).decoded
        rows, weights, grads = [r for r, _ in expected], [w for _, w in expected], [coded(x) for x in other.xs]
        poison(engines)
        got = streams.run(
            lambda rank: engines[rank].gradients(
                other.xs[rank], arrived[rank].rows_RD, arrived[rank].weights_R, arrived[rank].moves, format=format
            )
        )
        want_rows, want_weights = reference.gradients(grads, rows, weights, inputs.ids, case.num_experts)
        for rank, (grad_RD, grad_TK) in enumerate(got):
            assert torch.equal(grad_RD[: len(want_rows[rank])], want_rows[rank])
            assert_close("weights' gradient", grad_TK, want_weights[rank])
            assert torch.equal(grad_TK[inputs.ids[rank] < 0], torch.zeros_like(grad_TK[inputs.ids[rank] < 0]))


def test_resend_uses_the_cached_layout() -> None:
    case = Case(routing="holes")
    engines, streams = setup(case)
    inputs, other = Inputs.of(case, 1), Inputs.of(case, 2)
    arrived = dispatched(case, engines, streams, inputs)
    other.ids = inputs.ids
    poison(engines)
    again = streams.run(
        lambda rank: engines[rank].resend(
            other.xs[rank], other.weights[rank], arrived[rank].moves, len(arrived[rank].rows_RD)
        )
    )
    check_dispatch(case, again, other)


def test_alignment_pads_with_zeros() -> None:
    case = Case(align=16)
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    for rank, got in enumerate(dispatched(case, engines, streams, inputs)):
        rows, weights, ends = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank)
        start = padded = 0
        for end, aligned in zip(ends.tolist(), got.moves.offsets_e.tolist(), strict=True):
            count = end - start
            assert aligned - padded == -(-count // 16) * 16
            assert torch.equal(got.rows_RD[padded : padded + count], rows[start:end])
            assert torch.equal(got.weights_R[padded : padded + count], weights[start:end])
            assert not got.rows_RD[padded + count : aligned].any()
            start, padded = end, aligned


def test_overflow_is_counted_and_dropped() -> None:
    case, room = Case(exact=True), 40
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    arrived = streams.run(
        lambda rank: engines[rank].dispatch(inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], capacity=room)
    )
    torch.cuda.synchronize()
    kept = []
    for rank, got in enumerate(arrived):
        rows, weights, ends = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank)
        assert torch.equal(got.rows_RD, rows[:room])
        assert torch.equal(got.moves.offsets_e, ends.clamp(max=room))
        assert engines[rank].num_dropped == len(rows) - room > 0
        made = experts(rows)
        made[room:] = 0
        kept.append((made, weights))
    for exact in (False, True):
        got_y = streams.run(
            lambda rank: engines[rank].combine(
                kept[rank][0][:room].clone(),
                inputs.weights[rank] if exact else arrived[rank].weights_R,
                arrived[rank].moves,
                exact=exact,
            )  # fmt: skip
        )
        made, weights_R = [made for made, _ in kept], [weights for _, weights in kept]
        if exact:
            want = reference.combine_exact(made, inputs.weights, inputs.ids, case.num_experts)
        else:
            want = reference.combine(made, weights_R, inputs.ids, case.num_experts)
        assert all(map(torch.equal, got_y, want))


def test_plan_tells_the_exact_number_of_rows() -> None:
    case = Case(routing="holes")
    engines, streams = setup(case)

    def call(rank: int) -> int:
        with torch.cuda.stream(streams.streams[rank]):
            return engines[rank].plan(inputs.ids[rank])

    for seed in range(3):
        inputs = Inputs.of(case, seed)
        torch.cuda.synchronize()
        with ThreadPoolExecutor(case.world) as pool:
            got = list(pool.map(call, range(case.world)))
        want = [int(reference.rows_of_routes(inputs.ids, case.num_experts, rank)[1][-1]) for rank in range(case.world)]
        assert got == want


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
        engine.check()


def test_epochs_wrap() -> None:
    case = Case()
    engines, streams = setup(case)
    for engine in engines:
        for kind, name in enumerate(("dispatch", "combine")):
            engine.state[8 + 4 * kind : 10 + 4 * kind] = -3
            first = engine.map.starts[f"{name}_acks"]
            engine._window.memory[first : first + 8 * case.world].view(torch.int64).fill_(-3 << 32)
    for seed in range(6):
        round_trip(case, engines, streams, Inputs.of(case, seed))
    assert int(engines[0].state[8]) == 3


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
@pytest.mark.parametrize("graphed", [False, True])
def test_an_absent_rank_ends_in_an_error(operation: str, graphed: bool) -> None:
    case = Case(tokens=(16, 16, 16), num_experts=12)
    engines, streams = setup(case, timeout=0.5)
    inputs = Inputs.of(case)
    arrived = dispatched(case, engines, streams, inputs)

    def step(rank: int) -> Tensor:
        if operation == "combine":
            return engines[rank].combine(arrived[rank].rows_RD, arrived[rank].weights_R, arrived[rank].moves)
        return engines[rank].dispatch(inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], capacity=200).rows_RD

    streams.run(step)
    torch.cuda.synchronize()
    streams.streams.pop(1)  # rank 1 is gone; ranks 0 and 2 go on
    alive = {0: 0, 1: 2}
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = streams.run(lambda index: step(alive[index]))
        graph.replay()
    else:
        outputs = streams.run(lambda index: step(alive[index]))
    torch.cuda.synchronize()
    for output in outputs:
        assert output.isnan().all()
    for rank in (0, 2):
        with pytest.raises(OneSidedError, match=rf"rank {rank} of 3: {operation} waited 0.5 s for the .* of rank 1"):
            engines[rank].check()
        with pytest.raises(OneSidedError):
            step(rank)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_many_random_rounds(world: int) -> None:
    case = Case(tokens=(48,) * world, num_experts=8 * world, top_k=6, width=128, max_tokens=48)
    engines, streams = setup(case)
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    g = torch.Generator().manual_seed(world)
    for seed in range(700):
        tokens = tuple(torch.randint(0, 49, (world,), generator=g).tolist())
        now = replace(case, tokens=tokens, routing=("spread", "holes", "holes")[seed % 3])
        inputs = Inputs.of(now, seed)
        arrived = dispatched(now, engines, streams, inputs)
        ys = streams.run(lambda r: engines[r].combine(arrived[r].rows_RD, arrived[r].weights_R, arrived[r].moves))
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
        engine.check()
