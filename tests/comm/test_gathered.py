"""The gathered path and quantised experts on CPU ranks, in plain PyTorch and over emulated operators of Ascend.

Legend: T tokens of a rank, K routes a token, D width, R rows that arrive, E experts, I hidden width of an expert.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ascend_cases import apply_experts, expected_rows, oracle
from moeweave.comm.codec import Codec, decode_rows, encode_rows
from moeweave.comm.dispatchers.ascend import AscendDispatcher
from moeweave.comm.dispatchers.ascend_limits import AscendOptions
from moeweave.comm.dispatchers.gathered import GatheredDispatcher
from moeweave.kernels_ext.tolerance import SQNR_FLOOR, assert_close, sqnr
from moeweave.moe.experts import Experts
from moeweave.moe.quantize import QuantizedExperts, quantize_experts
from npu_local_emulator import an_npu
from plain_moe import Case, ids_of, tokens_of, weights_of
from run_ranks import run_ranks

BF16 = torch.bfloat16
ROUTING = ["npu_moe_init_routing_v2", "npu_moe_token_unpermute"]


def cases_on(world: int) -> list[Case]:
    uneven = (5, 17, 1, 9)[:world]
    cases = [Case(uneven, dtype=BF16, routing=way) for way in ("spread", "holes", "none", "hot", "beyond")]
    return [
        *cases,
        Case(uneven, top_k=3),
        Case((0, *uneven[1:]), dtype=BF16),
        Case((0,) * world, dtype=BF16),
        Case(uneven, dtype=BF16, num_experts=world, top_k=1),
        Case(uneven, dtype=BF16, weights_dtype=BF16),
    ]


CASES = [pytest.param(world, case, id=f"{world}ranks-{case.name}") for world in (2, 4) for case in cases_on(world)]


def one_call(case: Case, emulated: bool, codec: str = "none", coded_rows: bool = False) -> dict[str, Any]:
    with an_npu() if emulated else nullcontext() as operators:
        dispatcher = GatheredDispatcher(
            dist.group.WORLD, case.num_experts, 20, codec=Codec.parse(codec), coded_rows=coded_rows
        )
        x_TD, ids_TK, weights_TK = (each(case, dist.get_rank()) for each in (tokens_of, ids_of, weights_of))
        dispatched = dispatcher.dispatch_async(x_TD, ids_TK, weights_TK).wait()
        rows_RD, scales_R = dispatched.rows_RD, dispatched.scales_R
        if scales_R is not None:
            rows_RD = (rows_RD.float() * scales_R[:, None]).to(case.dtype)
        out_RD = apply_experts(case, rows_RD, dispatched.offsets_e)
        y_TD = dispatcher.combine_async(out_RD, weights_TK, dispatched).wait()
    last = int(dispatched.offsets_e[-1])
    scales = None if scales_R is None else scales_R[:last].clone()
    rows = dispatched.rows_RD[:last].clone()
    names = operators.names if emulated else []
    return dict(rows_RD=rows, scales_R=scales, offsets_e=dispatched.offsets_e, y_TD=y_TD, names=names)


@pytest.mark.parametrize("emulated", [False, True], ids=["plain", "emulated"])
@pytest.mark.parametrize("world, case", CASES)
def test_equals_a_loop_over_tokens(world: int, case: Case, emulated: bool) -> None:
    for rank, found in enumerate(run_ranks(world, one_call, case, emulated)):
        want_RD, counts = expected_rows(case, rank)
        assert found["names"] == (ROUTING if emulated else [])
        assert torch.equal(found["rows_RD"], want_RD), f"rank {rank}: rows by expert, then source, then route"
        assert found["scales_R"] is None
        assert found["offsets_e"].tolist() == torch.tensor(counts).cumsum(0).tolist()
        assert found["y_TD"].dtype == case.dtype
        assert_close(f"rank {rank} y_TD", found["y_TD"], oracle(case, rank), case.dtype)


@pytest.mark.parametrize("emulated", [False, True], ids=["plain", "emulated"])
@pytest.mark.parametrize("coded_rows", [False, True])
def test_int8_rows_are_quantised_once_before_they_leave(coded_rows: bool, emulated: bool) -> None:
    case = Case((5, 17), dim=64, dtype=BF16, routing="holes")
    for rank, found in enumerate(run_ranks(2, one_call, case, emulated, "int8", coded_rows)):
        want_RD = decode_rows(encode_rows(expected_rows(case, rank)[0], "int8", "token"), "int8", "token", 64, BF16)
        got_RD = found["rows_RD"]
        if coded_rows:
            assert got_RD.dtype == torch.int8
            got_RD = (got_RD.float() * found["scales_R"][:, None]).to(BF16)
        assert torch.equal(got_RD, want_RD)
        assert sqnr(found["y_TD"], oracle(case, rank)) > 35
        assert found["names"] == (["npu_dynamic_quant", *ROUTING] if emulated else [])


def test_what_it_cannot_do_is_refused() -> None:
    dispatcher = GatheredDispatcher(None, 8, 4)
    x_TD, ids_TK, weights_TK = torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"tokens of this rank \(5\) must be at most 4. Raise max_tokens"):
        dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    with pytest.raises(RuntimeError, match="Train with dispatcher='alltoall'"):
        dispatcher.dispatch(x_TD[:4].requires_grad_(), ids_TK[:4], weights_TK[:4])
    with pytest.raises(ValueError, match=r"codec \(fp8\) must be 'none' or 'int8'"):
        GatheredDispatcher(None, 8, 4, codec=Codec.parse("fp8"))


WIDE = Case((5, 17), dim=1024, dtype=BF16, routing="holes")


def experts_of(case: Case) -> Experts:
    torch.manual_seed(5)
    experts = Experts(case.dim, 64, case.num_experts)
    nn.init.normal_(experts.gate_up_proj, std=case.dim**-0.5)
    nn.init.normal_(experts.down_proj, std=0.125)
    return experts.to(case.dtype)


def through_quantised_experts(case: Case, way: str, kind: str) -> dict[str, Any]:
    """y_TD of this rank by codes all the way, and by the experts in their own dtype on all tokens."""
    group, experts = dist.group.WORLD, experts_of(case)
    assert group is not None
    x_TD, ids_TK, weights_TK = (each(case, dist.get_rank()) for each in (tokens_of, ids_of, weights_of))
    with torch.no_grad():
        plain = experts(x_TD, ids_TK, weights_TK)
    with an_npu() if way in ("ascend", "gathered") else nullcontext() as operators:
        if way in ("alltoall", "allgather"):
            quantised = quantize_experts(experts, group, kind=kind, dispatcher=way)
        else:
            given = dict(codec=Codec.parse(kind), coded_rows=True)
            moved: Any = GatheredDispatcher(group, case.num_experts, 20, **given)
            if way == "ascend":
                options = AscendOptions(max_tokens=20)
                moved = AscendDispatcher(
                    group, case.num_experts, options, group_name=group.group_name, call=operators, **given
                )
            here = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
            quantised = QuantizedExperts(experts.gate_up_proj[here], experts.down_proj[here], moved, kind)
        y_TD = quantised(x_TD, ids_TK, weights_TK)
    return dict(y_TD=y_TD, plain=plain, names=operators.names if operators else [])


W8A8 = ["npu_grouped_matmul", "npu_dequant_swiglu_quant", "npu_grouped_matmul"]
EXPECTED = {
    "ascend": ["npu_moe_distribute_dispatch_v2", *W8A8, "npu_moe_distribute_combine_v2"],
    "gathered": ["npu_dynamic_quant", "npu_moe_init_routing_v2", *W8A8, "npu_moe_token_unpermute"],
}


@pytest.mark.parametrize(
    "way, kind",
    [("alltoall", "int8"), ("alltoall", "fp8"), ("allgather", "int8"), ("ascend", "int8"), ("gathered", "int8")],
)
def test_quantised_experts_are_close_to_the_experts(way: str, kind: str) -> None:
    # Noise of one coding, six times: rows and weights in gate and in up, then codes and weights in down.
    floor = SQNR_FLOOR[kind][0] - 7.8
    for found in run_ranks(2, through_quantised_experts, WIDE, way, kind):
        # The operator that quantises rows has quantised both weights, before the first call.
        assert found["names"] == (["npu_dynamic_quant"] * 2 + EXPECTED[way] if way in EXPECTED else [])
        assert found["y_TD"].dtype == BF16
        assert sqnr(found["y_TD"], found["plain"]) > floor


def test_experts_that_cannot_be_quantised_are_named() -> None:
    for experts, rule in (
        (Experts(8, 8, 2, gated=False), "a gate"),
        (Experts(8, 8, 2, activation="gelu"), "act_fn as SiLU"),
        (Experts(8, 8, 2, bias=True), "no bias"),
    ):
        with pytest.raises(ValueError, match=f"must be packed gated SiLU experts to be quantised: {rule}"):
            quantize_experts(experts)
