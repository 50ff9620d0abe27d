"""The ascend dispatcher over emulated operators: rows bit for bit, numbers within the table, on 2 and 4 ranks; limits,
window and refusals without any rank.

Legend: T tokens of a rank, K routes a token, D width, R rows that arrive, E experts, e experts of this rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ascend_cases import apply_experts, expected_rows, oracle
from moeweave.comm.codec import Codec, decode_rows, encode_rows
from moeweave.comm.dispatchers.ascend import AscendDispatcher, fill_routes, make_ascend
from moeweave.comm.dispatchers.ascend_limits import (
    AscendOptions,
    check_call,
    check_codec,
    check_group,
    check_window,
    series_of,
    window_bytes,
)
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.kernels_ext.tolerance import assert_close, sqnr
from npu_emulator import NpuEmulator
from plain_moe import Case, ids_of, tokens_of, weights_of
from run_ranks import run_ranks

BF16, FP16 = torch.bfloat16, torch.float16


def cases_on(world: int) -> list[Case]:
    uneven = (5, 17, 1, 9)[:world]
    cases = [Case(uneven, dim=1024, routing=way, dtype=BF16) for way in ("spread", "holes", "none", "hot", "beyond")]
    return [
        *cases,
        Case(uneven, dim=1024, dtype=FP16, top_k=3),
        Case(uneven, dim=1056, dtype=BF16, top_k=8, routing="holes"),
        Case((0, *uneven[1:]), dim=1024, dtype=BF16),
        Case((0,) * world, dim=1024, dtype=BF16),
        Case(uneven, dim=1024, dtype=BF16, num_experts=world, top_k=1),
        Case(uneven, dim=1024, dtype=BF16, weights_dtype=BF16),
    ]


CASES = [pytest.param(world, case, id=f"{world}ranks-{case.name}") for world in (2, 4) for case in cases_on(world)]


def ascend(case: Case, codec: str = "none", coded_rows: bool = False, **options: Any) -> AscendDispatcher:
    group = dist.group.WORLD
    assert group is not None
    given = AscendOptions(**{"max_tokens": 20, **options})
    formats = dict(codec=Codec.parse(codec), coded_rows=coded_rows)
    return AscendDispatcher(group, case.num_experts, given, group_name=group.group_name, call=NpuEmulator(), **formats)


def one_call(case: Case, options: dict[str, Any], posted: bool) -> dict[str, Tensor | None]:
    dispatcher, rank = ascend(case, **options), dist.get_rank()
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    if posted:
        dispatched = dispatcher.dispatch_async(x_TD, ids_TK, weights_TK).wait()
    else:
        dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    rows_RD, scales_R = dispatched.rows_RD, dispatched.scales_R
    if scales_R is not None:
        rows_RD = (rows_RD.float() * scales_R[:, None]).to(case.dtype)
    out_RD = apply_experts(case, rows_RD, dispatched.offsets_e)
    if posted:
        y_TD = dispatcher.combine_async(out_RD, weights_TK, dispatched).wait()
    else:
        y_TD = dispatcher.combine(out_RD, weights_TK, dispatched)
    num_rows = int(dispatched.offsets_e[-1])
    scales = None if scales_R is None else scales_R[:num_rows].clone()
    rows = dispatched.rows_RD[:num_rows].clone()
    return dict(rows_RD=rows, scales_R=scales, offsets_e=dispatched.offsets_e, y_TD=y_TD)


@pytest.mark.parametrize("world, case", CASES)
def test_equals_a_loop_over_tokens(world: int, case: Case) -> None:
    for posted in (False, True):
        for rank, found in enumerate(run_ranks(world, one_call, case, {}, posted)):
            want_RD, counts = expected_rows(case, rank)
            assert torch.equal(found["rows_RD"], want_RD), f"rank {rank}: rows by expert, then source, then route"
            assert found["scales_R"] is None
            assert found["offsets_e"].dtype == torch.int32
            assert found["offsets_e"].tolist() == torch.tensor(counts).cumsum(0).tolist()
            assert found["y_TD"].dtype == case.dtype
            assert_close(f"rank {rank} y_TD", found["y_TD"], oracle(case, rank), case.dtype)


@pytest.mark.parametrize("world", [2, 4])
def test_quantized_rows_carry_amax_over_127(world: int) -> None:
    case = Case((5, 17, 1, 9)[:world], dim=1024, dtype=BF16, routing="holes")
    for rank, found in enumerate(run_ranks(world, one_call, case, {"codec": "int8", "coded_rows": True}, False)):
        want_RD, _ = expected_rows(case, rank)
        assert found["rows_RD"].dtype == torch.int8
        assert torch.equal(found["scales_R"], want_RD.float().abs().amax(1) / 127)
        error = found["rows_RD"].float() * found["scales_R"][:, None] - want_RD.float()
        assert bool((error.abs() <= found["scales_R"][:, None] * 0.5001).all()), "half a step at most"
        assert sqnr(found["y_TD"], oracle(case, rank)) > 35


def test_quantized_rows_are_decoded_unless_asked_for() -> None:
    case = Case((5, 17), dim=1024, dtype=BF16, routing="holes")
    for rank, found in enumerate(run_ranks(2, one_call, case, {"codec": "int8"}, False)):
        wire_RB = encode_rows(expected_rows(case, rank)[0], "int8", "token")
        assert found["scales_R"] is None
        assert torch.equal(found["rows_RD"], decode_rows(wire_RB, "int8", "token", 1024, BF16))


@pytest.mark.parametrize("tokens", [(4, 7), (1, 1), (7, 1, 3, 2)])
def test_a2_takes_uneven_counts_by_global_bs(tokens: tuple[int, ...]) -> None:
    case = Case(tokens, dim=64, dtype=BF16)
    for rank, found in enumerate(run_ranks(len(tokens), one_call, case, {"series": "A2"}, False)):
        assert torch.equal(found["rows_RD"], expected_rows(case, rank)[0])
        assert_close(f"rank {rank} y_TD", found["y_TD"], oracle(case, rank), BF16)


def shared_and_same_as_alltoall(case: Case) -> list[Tensor]:
    rank, dispatcher = dist.get_rank(), ascend(case)
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    out_RD = apply_experts(case, dispatched.rows_RD, dispatched.offsets_e)
    other = make_dispatcher("alltoall", dist.group.WORLD, case.num_experts)
    sent = other.dispatch(x_TD, ids_TK, weights_TK)
    plain = other.combine(apply_experts(case, sent.rows_RD, sent.offsets_e), weights_TK, sent)
    combined = dispatcher.combine(out_RD, weights_TK, dispatched)
    return [combined, plain, dispatcher.combine(out_RD, weights_TK, dispatched, shared_TD=x_TD), x_TD]


def test_agrees_with_alltoall_and_adds_the_shared_expert() -> None:
    for combined, plain, shared, x_TD in run_ranks(
        2, shared_and_same_as_alltoall, Case((5, 17), dim=1024, dtype=BF16, routing="holes")
    ):
        assert_close("alltoall", combined, plain)
        assert_close("shared", shared, combined.double() + x_TD.double(), BF16)


def refusals(case: Case) -> list[str]:
    dispatcher, rank = ascend(case), dist.get_rank()
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    a2 = ascend(case, series="A2")
    found = []
    for run in (
        lambda: dispatcher.dispatch(x_TD.clone().requires_grad_(), ids_TK, weights_TK),
        lambda: dispatcher.dispatch(x_TD.float(), ids_TK, weights_TK),
        lambda: a2.dispatch(x_TD, torch.full_like(ids_TK, -1), weights_TK),
        lambda: make_dispatcher("ascend", dist.group.WORLD, case.num_experts),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            run()
        found.append(str(caught.value))
    with torch.no_grad():
        dispatcher.dispatch(x_TD.clone().requires_grad_(), ids_TK, weights_TK)
    return found


def test_what_it_cannot_do_is_refused() -> None:
    for grad, dtype, holes, device in run_ranks(2, refusals, Case((5, 5), dim=1024, dtype=BF16)):
        assert "Train with dispatcher='alltoall'" in grad
        assert "x.dtype (torch.float32) must be bfloat16 or float16" in dtype
        assert "has no mask of routes" in holes
        assert "backend (gloo) must be hccl" in device
    with pytest.raises(ValueError, match="none, one rank"):
        make_ascend(None, 8, AscendOptions())


def test_routes_that_do_not_exist_get_experts_of_their_own() -> None:
    ids = torch.tensor([[2, -1, 0, -1], [-1, -1, -1, -1], [3, 1, 0, 2]])
    filled = fill_routes(ids, ids >= 0, 4)
    assert filled.tolist() == [[2, 1, 0, 3], [0, 1, 2, 3], [3, 1, 0, 2]]


def test_window() -> None:
    assert window_bytes(AscendOptions(max_tokens=1), 4, 1024, 2, 8) == 53248
    assert window_bytes(AscendOptions("A2", 1), 16, 64, 2, 32) == 2 * (16 * 2 * 128 + (2 << 20))
    needed = -(-window_bytes(AscendOptions(max_tokens=512), 16, 7168, 8, 256) // (1 << 20))
    check_window(AscendOptions(max_tokens=512), needed, 16, 7168, 8, 256)
    with pytest.raises(ValueError, match=rf"HCCL_BUFFSIZE \({needed - 1}\) must be at least {needed} MB"):
        check_window(AscendOptions(max_tokens=512), needed - 1, 16, 7168, 8, 256)


@pytest.mark.parametrize(
    "check, text",
    [
        (lambda: check_codec(Codec.parse("fp8")), r"codec \(fp8\) must be 'none' or 'int8' for dispatcher='ascend'"),
        (lambda: check_codec(Codec(combine="int8")), r"codec \(combine=int8\) must be 'none' or 'int8'"),
        (lambda: series_of("Ascend310P3"), r"device \('Ascend310P3'\) must be an Ascend910B \(A2\)"),
        (lambda: AscendOptions(max_tokens=0, path="gathered"), r"max_tokens \(0\) must be at least 1"),
        (lambda: AscendOptions("A5"), r"series \('A5'\) must be one of A2, A3"),
        (lambda: AscendOptions("A2", 257), r"max_tokens \(257\) must be 1 to 256 on A2"),
        (lambda: AscendOptions("A3", 513), r"max_tokens \(513\) must be 1 to 512 on A3"),
        (lambda: check_group(AscendOptions("A2"), 12, 24), r"ep \(12\) must be 2 to 8, 16"),
        (lambda: check_group(AscendOptions("A2"), 2, 64), r"num_experts / ep \(32\) must be at most 24 on A2"),
        (lambda: check_group(AscendOptions(), 1, 8), r"ep \(1\) must be 2 to 768 on A3"),
        (lambda: check_group(AscendOptions(), 4, 2048), r"num_experts \(2048\) must be at most 1024"),
        (lambda: check_call(AscendOptions(), 1, 512, 2, 8), r"dim \(512\) must be 1024 to 8192 on A3"),
        (lambda: check_call(AscendOptions("A2"), 1, 65, 2, 8), r"dim \(65\) must be 32 to 7168, a multiple of 32"),
        (lambda: check_call(AscendOptions("A2"), 0, 64, 2, 8), r"tokens of this rank \(0\) must be at least 1 on A2"),
        (lambda: check_call(AscendOptions(), 129, 1024, 2, 8), r"tokens of this rank \(129\) must be at most max_tok"),
        (lambda: check_call(AscendOptions(), 1, 1024, 17, 64), r"top_k \(17\) must be 1 to 16"),
    ],
)
def test_limits(check: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check()


def test_series_by_the_devices_name() -> None:
    assert [series_of(name) for name in ("Ascend910B1", "Ascend910_9391")] == ["A2", "A3"]
