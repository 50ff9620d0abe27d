"""The one-sided kernels' source on a CPU in many orders of its warps, and what that emulation is able to see.

Rounds, codecs, gradients and failures are in the other test_onesided_* files, whose cases run here too (device "cpu").
"""

from __future__ import annotations

import pytest
import torch

from cuda_on_cpu import needs_gxx, onesided_text
from moeweave.comm.onesided_launch import Budget
from moeweave.kernels_ext.onesided import Variants
from onesided_cases import Case, Inputs, dispatched, poison, round_trip, setup

pytestmark = needs_gxx

ORDERS = [(64, Budget(2, 2)), (128, Budget(1, 1)), (96, Budget(3, 2))]


@pytest.mark.parametrize("threads, budget", ORDERS, ids=str)
def test_any_order_of_warps_gives_the_same(threads: int, budget: Budget) -> None:
    case = Case(tokens=(20, 33, 0), num_experts=12, width=1024, routing="holes", exact=True, device="cpu")
    for seed in range(6):
        engines, ranks = setup(case, threads=threads, budget=budget, seed=seed)
        for each in range(2):
            poison(engines)
            round_trip(case, engines, ranks, Inputs.of(case, each))


OTHERS = (("MW_EXPAND_HOME", 0), ("MW_SUM_HOME", 0), ("MW_SUM_DEPTH", 3), ("MW_DECODE_DEPTH", 8))


@pytest.mark.slow
@pytest.mark.parametrize("code", ["none", "fp8"])
def test_other_ways_to_write_the_kernels_give_the_same(code: str) -> None:
    case = Case(routing="holes", exact=True, format=code, width=1024, device="cpu")
    for seed in range(3):
        engines, ranks = setup(case, seed=seed, variants=OTHERS)
        round_trip(case, engines, ranks, Inputs.of(case, seed))
    if code == "none":
        run_rounds(onesided_text(), OTHERS)


def run_rounds(text: str, variants: Variants = (), seeds: int = 4) -> None:
    """Dispatches of several rounds without a halt between: a rank may be one ahead."""
    case = Case(tokens=(33, 64), width=1024, device="cpu")
    for seed in range(seeds):
        engines, ranks = setup(case, threads=128, seed=seed, text=text, timeout=0.2, variants=variants)
        inputs = [Inputs.of(case, each) for each in range(4)]

        def call(rank: int, engines=engines, inputs=inputs) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
            engine, room = engines[rank], engines[rank].worst_capacity()
            return [engine.dispatch(i.xs[rank], i.ids[rank], i.weights[rank], capacity=room).rows_RD for i in inputs]

        got = ranks.run(call)
        engines, ranks = setup(case)
        for number, each in enumerate(inputs):
            for rank, want in enumerate(dispatched(case, engines, ranks, each)):
                end = int(want.moves.offsets_e[-1])
                assert torch.equal(got[rank][number][:end], want.rows_RD[:end])


def test_rounds_without_a_halt_between() -> None:
    run_rounds(onesided_text())


CHUNKS = "    const int chunks = (count + p.chunk - 1) / p.chunk;\n"
ACKNOWLEDGED = "const bool free = !round.dead && is_acknowledged(p, epoch - 1);"
COUNTS = "        __syncthreads();\n        if (threadIdx.x == 0) publish(peers[w] + p.at_flags"
BROKEN = [
    pytest.param(CHUNKS + "    __syncthreads();\n", CHUNKS, id="barrier before rows are published"),
    pytest.param(ACKNOWLEDGED, "const bool free = !round.dead;", id="wait for the acknowledgement"),
    pytest.param(COUNTS, COUNTS.split("\n", 1)[1], id="barrier before counts are published"),
]


@pytest.mark.parametrize("before, after", BROKEN)
def test_the_emulation_sees_a_missing(before: str, after: str) -> None:
    text = onesided_text()
    assert before in text
    with pytest.raises((AssertionError, RuntimeError)):
        run_rounds(text.replace(before, after), seeds=12)
