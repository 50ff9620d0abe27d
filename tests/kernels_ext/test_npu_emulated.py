"""NPU implementations over emulated operators, against their references: what the library asks of an operator gives
what the contract says.

Letters: R rows, E groups, D columns in, F columns out, T tokens, K routes a token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeweave.kernels_ext import expand_rows, gating_top_k, quantize_rows, scaled_grouped_mm, swiglu_quant
from moeweave.kernels_ext.gating_top_k import Gating
from moeweave.kernels_ext.tolerance import assert_close, sqnr
from moeweave.moe.router import Router
from npu_local_emulator import an_npu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("ends", [[3, 9], [0, 9], [9, 9], [2, 5]])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_w8a8_product(dtype: torch.dtype, ends: list[int]) -> None:
    codes_RD, scales_R1 = quantize_rows.encode(torch.randn(9, 64), "int8")
    weight, scales_EF = scaled_grouped_mm.quantize_weight(torch.randn(2, 64, 24), "int8")
    given = codes_RD, scales_R1[:, 0], weight, scales_EF, torch.tensor(ends, dtype=torch.int32)
    with an_npu() as operators:
        got = scaled_grouped_mm.scaled_grouped_mm(*given, dtype)[: ends[-1]]
    assert operators.names == ["npu_grouped_matmul"]
    assert got.dtype == dtype
    want = scaled_grouped_mm.scaled_grouped_mm(*given, FP32)[: ends[-1]]
    assert_close("product", got, want, BF16 if dtype == FP32 else dtype)


@pytest.mark.parametrize("kind", ["fp8", "fp8_group128"])
def test_other_codes_are_not_the_operators(kind: str) -> None:
    codes_RD, scales_RG = quantize_rows.encode(torch.randn(4, 128), kind)
    weight, scales_EF = scaled_grouped_mm.quantize_weight(torch.randn(1, 128, 8), "fp8")
    with an_npu() as operators:
        scaled_grouped_mm.scaled_grouped_mm(
            codes_RD, scales_RG, weight, scales_EF, torch.tensor([4], dtype=torch.int32)
        )
        swiglu_quant.swiglu_quant(torch.randn(4, 256), kind)
        quantize_rows.encode(torch.randn(4, 128).to(BF16), kind)
    assert "npu_dequant_swiglu_quant" not in operators.names and "npu_dynamic_quant" not in operators.names
    assert scaled_grouped_mm.npu_impl.supports(codes_RD, scales_RG, weight).startswith("the operator takes int8")


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_swiglu_and_rows_quantised(dtype: torch.dtype) -> None:
    gate_up_RF = torch.randn(7, 64).to(dtype)
    gate_up_RF[3] = 0
    with an_npu() as operators:
        codes, scales = swiglu_quant.swiglu_quant(gate_up_RF)
        rows = quantize_rows.encode(gate_up_RF, "int8")
    assert operators.names == ["npu_dequant_swiglu_quant", "npu_dynamic_quant"]
    want_codes, want_scales = swiglu_quant.swiglu_quant(gate_up_RF, impl="reference")
    torch.testing.assert_close(scales, want_scales)
    assert int((codes.int() - want_codes.int()).abs().max()) <= 1
    assert float((codes == want_codes).float().mean()) > 0.99
    want = quantize_rows.encode(gate_up_RF, "int8", impl="reference")
    assert torch.equal(rows[0], want[0]) and torch.equal(rows[1], want[1])


def test_swiglu_worked_example_and_refusals() -> None:
    codes, scales = swiglu_quant.swiglu_quant(torch.tensor([[0.0, 100.0, 2.0, 3.0]]))
    assert codes.tolist() == [[0, 127]]
    assert float(scales) == pytest.approx(300 / 127)
    with pytest.raises(ValueError, match=r"must be floating point \[R, F\], F even"):
        swiglu_quant.swiglu_quant(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="npu: it is for npu, not cpu"):
        swiglu_quant.swiglu_quant(torch.zeros(2, 4, dtype=BF16), impl="npu")
    with pytest.raises(ValueError, match="must be one of int8"):
        swiglu_quant.swiglu_quant(torch.zeros(2, 4), "int4")


IDS = {
    "spread": [[0, 3], [1, 2], [2, 0], [3, 1], [2, 3]],
    "holes": [[-1, 3], [-1, -1], [2, 9], [3, -1], [4, 2]],
    "hot": [[2, -1]] * 5,
    "elsewhere": [[0, 1]] * 5,
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("dtype", [BF16, FP32, torch.int8])
def test_rows_expanded_and_reduced(ids: list[list[int]], dtype: torch.dtype) -> None:
    ids_NK, weights_NK = torch.tensor(ids), torch.rand(5, 2)
    x_ND = torch.arange(5 * 16).view(5, 16).to(dtype)
    scales_N = torch.rand(5) if dtype == torch.int8 else None
    here_NK = (ids_NK >= 2) & (ids_NK < 4)
    want = expand_rows.expand(x_ND, scales_N, ids_NK, (2, 4), 4)
    with an_npu() as operators:
        got = expand_rows.expand(x_ND, scales_N, ids_NK, (2, 4), 4)
    assert operators.names == ["npu_moe_init_routing_v2"]
    last = int(want.offsets_e[-1])
    assert last == int(here_NK.sum())
    assert torch.equal(got.offsets_e, want.offsets_e) and got.offsets_e.dtype == torch.int32
    assert torch.equal(got.rows_RD[:last], want.rows_RD[:last])
    assert torch.equal(got.place_R[here_NK.flatten()], want.place_R[here_NK.flatten()])
    assert sorted(got.place_R.tolist()) == sorted(want.place_R.tolist()) == list(range(10))
    if scales_N is not None:
        assert torch.equal(got.scales_R[:last], want.scales_R[:last])
    rows_RD = torch.full((10, 8), float("nan"), dtype=BF16)
    rows_RD[:last] = torch.randn(last, 8).to(BF16)
    with an_npu() as operators:
        summed = expand_rows.reduce(rows_RD, got, weights_NK, here_NK)
    assert operators.names == ["npu_moe_token_unpermute"]
    assert_close("sums", summed, plain_sums(rows_RD, want.place_R, weights_NK, here_NK), BF16)
    assert_close("sums", expand_rows.reduce(rows_RD, want, weights_NK, here_NK), summed, BF16)


def plain_sums(rows_RD: Tensor, place_R: Tensor, weights_NK: Tensor, here_NK: Tensor) -> Tensor:
    total = torch.zeros(len(here_NK), rows_RD.shape[1], dtype=torch.float64)
    for token, k in here_NK.nonzero().tolist():
        total[token] += weights_NK[token, k].double() * rows_RD[place_R[token * 2 + k]].double()
    return total


def test_expand_worked_example() -> None:
    found = expand_rows.expand(torch.tensor([[7.0], [8.0]]), None, torch.tensor([[0, 1], [1, 2]]), (1, 2), 3)
    assert found.rows_RD[:2].tolist() == [[7.0], [8.0]]
    assert found.offsets_e.tolist() == [2]


RULES = [
    dict(kind="softmax"),
    dict(kind="softmax", renormalize=False, scale=2.5),
    dict(kind="topk_softmax"),
    dict(kind="sigmoid", scale=2.5),
    dict(kind="sigmoid", num_groups=4, top_groups=2),
]


def chosen(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weights by expert: the order of a token's experts is not defined."""
    return torch.zeros(len(ids_TK), 32).scatter(1, ids_TK, weights_TK)


@pytest.mark.parametrize("options", RULES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_router_by_the_operator(dtype: torch.dtype, options: dict[str, object]) -> None:
    router = Router(16, 32, 3, **options).to(dtype)
    torch.nn.init.normal_(router.weight, std=0.5)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.normal_(0, 0.1)
    x_TD = torch.randn(11, 16).to(dtype)
    _, weights_TK, ids_TK = router(x_TD)
    with an_npu() as operators, torch.no_grad():
        _, got_TK, got_ids_TK = router(x_TD)
    assert operators.names == ["npu_moe_gating_top_k"]
    assert (got_TK.dtype, got_ids_TK.dtype) == (weights_TK.dtype, ids_TK.dtype)
    torch.testing.assert_close(chosen(got_ids_TK, got_TK), chosen(ids_TK, weights_TK.detach()), atol=1e-6, rtol=1e-5)


def test_choices_that_the_operator_cannot_make_are_the_references() -> None:
    logits = torch.randn(4, 32)
    with an_npu() as operators:
        gating_top_k.gating_top_k(logits, Gating(2, "sigmoid", renormalize=False), torch.zeros(32))
        gating_top_k.gating_top_k(logits[:0], Gating(2))
        gating_top_k.gating_top_k(torch.randn(4, 32, requires_grad=True), Gating(2))
        gating_top_k.gating_top_k(logits, Gating(2, "sigmoid", num_groups=16, top_groups=4), torch.zeros(32))
        gating_top_k.gating_top_k(torch.randn(2, 4096), Gating(2))
    assert operators.names == []
    with pytest.raises(ValueError, match="npu: it has no gradient"):
        gating_top_k.gating_top_k(torch.randn(4, 32, requires_grad=True), Gating(2), impl="npu")


def test_gating_worked_example() -> None:
    weights, ids = gating_top_k.gating_top_k(torch.tensor([[1.0, 3.0, 4.0]]).log(), Gating(2))
    assert ids.tolist() == [[2, 1]]
    assert weights.tolist() == [[pytest.approx(4 / 7), pytest.approx(3 / 7)]]


def test_int8_rows_keep_their_signal() -> None:
    gate_up_RF = torch.randn(64, 512).to(BF16)
    with an_npu():
        codes, scales = swiglu_quant.swiglu_quant(gate_up_RF)
    gate, up = gate_up_RF.float().chunk(2, 1)
    assert sqnr(quantize_rows.decode(codes, scales, FP32), torch.nn.functional.silu(gate) * up) > 30
