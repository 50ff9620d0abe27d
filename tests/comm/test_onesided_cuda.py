"""Rows and sums of the CUDA engine, virtual ranks on one GPU or emulated, against the reference in plain PyTorch.

Rows that were moved, exact sums and prereduced sums are equal bit for bit; what goes through a codec equals the codec's
own encode and decode; dot products are within the table.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeweave.comm.onesided_cuda import CudaArrived
from moeweave.kernels_ext.onesided import reference
from moeweave.kernels_ext.tolerance import SQNR_FLOOR, assert_close, sqnr
from onesided_cases import (
    Case,
    Inputs,
    check_dispatch,
    dispatched,
    on_devices,
    on_devices_of,
    poison,
    round_trip,
    setup,
)

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


def quick(case: Case) -> bool:
    return case.top_k == 4 and case.dtype == torch.bfloat16 and case.max_tokens == 64


@on_devices_of("case", CASES, quick)
def test_round_trip(case: Case, device: str) -> None:
    case = replace(case, device=device)
    engines, streams = setup(case)
    for seed in range(3):
        poison(engines)
        round_trip(case, engines, streams, Inputs.of(case, seed))


CODED = [("fp8", "token"), ("fp8", "group128"), ("int8", "token"), ("fp8_e5m2", "token"), ("fp8_e5m2", "group128")]
QUICK = [(("fp8", "token"), torch.bfloat16), (("fp8", "group128"), torch.bfloat16)]


@on_devices_of("coded", list(itertools.product(CODED, [torch.bfloat16, torch.float32])), lambda coded: coded in QUICK)
def test_codec(coded: tuple[tuple[str, str], torch.dtype], device: str) -> None:
    (code, scale), dtype = coded
    case = Case(
        tokens=(37, 64, 0, 50), width=640, format=code, scale=scale, dtype=dtype, exact=True, routing="holes",
        device=device,
    )  # fmt: skip
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    inputs.xs[0][3] = 0.0
    inputs.xs[1][5] *= 1e-3
    round_trip(case, engines, streams, inputs)
    assert sqnr(case.coded(inputs.xs[1]), inputs.xs[1]) > SQNR_FLOOR[code][0]


@on_devices
def test_not_finite_rows_arrive_as_nan(device: str) -> None:
    case = Case(tokens=(8, 8), format="fp8", routing="spread", device=device)
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    inputs.xs[0][2, 7], inputs.xs[1][3, 100] = float("nan"), float("inf")
    arrived = dispatched(case, engines, streams, inputs)
    for rank, got in enumerate(arrived):
        rows, _, _ = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank, case.coded)
        assert torch.equal(got.rows_RD[: len(rows)].isnan(), rows.isnan())
        assert rows.isnan().all(1).any()


@on_devices_of("coded", CODED[:3], lambda coded: coded[0] == "fp8")
def test_raw_rows_keep_their_codes(coded: tuple[str, str], device: str) -> None:
    code, scale = coded
    case = Case(width=640, format=code, scale=scale, device=device)
    engines, streams = setup(case)
    inputs = Inputs.of(case)
    for rank, got in enumerate(dispatched(case, engines, streams, inputs, raw=True)):
        rows, _, _ = reference.dispatch(inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank, case.coded)
        assert got.scales_RG is not None
        groups = got.scales_RG.shape[1]
        grouped = got.rows_RD[: len(rows)].float().view(len(rows), groups, -1) * got.scales_RG[: len(rows), :, None]
        assert torch.equal(grouped.view(len(rows), -1).to(case.dtype), rows)


@on_devices
@pytest.mark.parametrize("code", ["none", "fp8_e5m2"])
@pytest.mark.parametrize("routed", ["spread", "holes"])
def test_gradients(routed: str, code: str, device: str) -> None:
    case = Case(routing=routed, device=device)
    engines, streams = setup(case)
    for seed in range(2):
        inputs, other = Inputs.of(case, seed), Inputs.of(case, seed + 7)
        arrived = dispatched(case, engines, streams, inputs)
        expected = check_dispatch(case, arrived, inputs)
        coded = replace(case, format=code).decoded
        rows, weights, grads = [r for r, _ in expected], [w for _, w in expected], [coded(x) for x in other.xs]
        poison(engines)

        def call(rank: int, other: Inputs = other, arrived: list[CudaArrived] = arrived) -> tuple[Tensor, Tensor]:
            got = arrived[rank]
            return engines[rank].gradients(other.xs[rank], got.rows_RD, got.weights_R, got.moves, format=code)

        got = streams.run(call)
        want_rows, want_weights = reference.gradients(grads, rows, weights, inputs.ids, case.num_experts)
        for rank, (grad_RD, grad_TK) in enumerate(got):
            assert torch.equal(grad_RD[: len(want_rows[rank])], want_rows[rank])
            assert_close("weights' gradient", grad_TK, want_weights[rank])
            assert torch.equal(grad_TK[inputs.ids[rank] < 0], torch.zeros_like(grad_TK[inputs.ids[rank] < 0]))


@on_devices
def test_resend_uses_the_cached_layout(device: str) -> None:
    case = Case(routing="holes", device=device)
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


@on_devices
def test_alignment_pads_with_zeros(device: str) -> None:
    case = Case(align=16, device=device)
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
