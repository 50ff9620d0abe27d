"""Quantised rows times quantised weights: against decoded factors in float64, what is refused, torch's own rules.

Letters: R rows, E groups, D columns in, F columns out.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.comm.codec import encode_rows, split_wire
from moeweave.kernels_ext.quantize_rows import decode, encode
from moeweave.kernels_ext.scaled_grouped_mm import quantize_weight, scaled_grouped_mm, torch_impl
from moeweave.kernels_ext.tolerance import SQNR_FLOOR, assert_close, sqnr


def factors(counts: list[int], dim: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets_e = torch.tensor(counts).cumsum(0).to(torch.int32)
    return torch.randn(sum(counts), dim), torch.randn(len(counts), dim, width) / dim**0.5, offsets_e


def product(rows_RD: Tensor, weight_EDF: Tensor, offsets_e: Tensor) -> Tensor:
    """One group at a time, in float64."""
    starts = [0, *offsets_e.tolist()]
    parts = [rows_RD[a:b].double() @ weight_EDF[e].double() for e, (a, b) in enumerate(pairwise(starts))]
    return torch.cat(parts)


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0], [1], [17, 63, 0, 2]])
@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8_e5m2", "fp8_group128"])
def test_is_the_product_of_the_decoded_factors(kind: str, counts: list[int]) -> None:
    rows_RD, weight_EDF, offsets_e = factors(counts, 256, 24)
    codes_RD, scales_RG = encode(rows_RD, kind)
    scales = scales_RG if "group" in kind else scales_RG[:, 0]
    weight, scales_EF = quantize_weight(weight_EDF, kind.removesuffix("_group128"))
    decoded = weight.double() * scales_EF.double().unsqueeze(1)
    want = product(decode(codes_RD, scales_RG, torch.float64), decoded, offsets_e)
    for dtype in (torch.float32, torch.bfloat16):
        got = scaled_grouped_mm(codes_RD, scales, weight, scales_EF, offsets_e, dtype)
        assert got.dtype == dtype
        assert_close("product", got, want)


def test_loses_no_more_than_its_two_factors_do() -> None:
    rows_RD, weight_EDF, offsets_e = factors([40, 24], 1024, 64)
    codes_RD, scales_R1 = encode(rows_RD, "fp8")
    got = scaled_grouped_mm(codes_RD, scales_R1[:, 0], *quantize_weight(weight_EDF), offsets_e, torch.float32)
    assert sqnr(got, product(rows_RD, weight_EDF, offsets_e)) > SQNR_FLOOR["fp8"][0] - 3.1


def test_rows_of_a_wire_are_taken_as_they_lie() -> None:
    rows_RD, weight_EDF, offsets_e = factors([4, 2], 20, 8)
    codes_RD, scales_R1 = split_wire(encode_rows(rows_RD, "fp8", "token"), "fp8", "token", 20)
    weights = quantize_weight(weight_EDF)
    same, scales = encode(rows_RD, "fp8")
    got = scaled_grouped_mm(codes_RD, scales_R1.squeeze(1), *weights, offsets_e)
    assert torch.equal(got, scaled_grouped_mm(same, scales[:, 0], *weights, offsets_e))


def test_a_weight_has_a_scale_for_each_column_out() -> None:
    weight_EDF = torch.tensor([[[1.0, 100.0], [-2.0, 50.0]]])
    codes, scales_EF = quantize_weight(weight_EDF)
    assert scales_EF.tolist() == [[pytest.approx(2 / 448), pytest.approx(100 / 448)]]
    assert codes.float().tolist() == [[[224.0, 448.0], [-448.0, 224.0]]]
    assert codes.transpose(1, 2).is_contiguous()
    again, _ = quantize_weight(weight_EDF.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(again.float(), codes.float())


def meta(counts: list[int], dim: int, width: int) -> tuple[Tensor, ...]:
    """Arguments as the torch implementation gets them, without memory: codes and scales are views of wire rows."""
    wire_RB = torch.empty(sum(counts), dim + 16, dtype=torch.uint8, device="meta")
    codes_RD, scales_R1 = split_wire(wire_RB, "fp8", "token", dim)
    weight = torch.empty(len(counts), width, dim, dtype=torch.float8_e4m3fn, device="meta").transpose(1, 2)
    scales_EF = torch.empty(len(counts), width, device="meta")
    return codes_RD, scales_R1.squeeze(1), weight, scales_EF, torch.empty(len(counts), dtype=torch.int32, device="meta")


def test_what_the_torch_implementation_passes_keeps_torchs_rules() -> None:
    arguments = meta([8, 3], 256, 64)
    assert torch_impl.breaks(*arguments[:3]) is None
    out_RF = torch_impl.forward(*arguments, torch.float32)
    assert (out_RF.shape, out_RF.dtype) == ((11, 64), torch.float32)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda c, s, w: (c.view(torch.int8), s, w), "torch takes float8_e4m3fn, not torch.int8 with"),
        (lambda c, s, w: (c, s[:, None], w), "one scale a row"),
        (lambda c, s, w: (c[:0], s[:0], w), "a size is 0"),
        (lambda c, s, w: (c, s, w.contiguous()), "the weight by column"),
        (lambda c, s, w: (c[:, :40], s, w[:, :40]), "multiples of 16 bytes"),
    ],
)
def test_rules_that_the_torch_implementation_names(change: Any, text: str) -> None:
    assert text in str(torch_impl.breaks(*change(*meta([8, 3], 256, 64)[:3])))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(codes=torch.ones(6, 5)), r"with one D\. Quantise weight\.transpose"),
        (dict(scales=torch.ones(5)), r"scales \(5,\) must be \[R\] or \[R, G\]"),
        (dict(weight_scales=torch.ones(2, 9)), r"weight scales \(2, 9\) \[E, F\]"),
        (dict(offsets=torch.tensor([4, 6])), r"must be int32 \[E\], E = 2"),
        (dict(impl="torch"), r"it is for cuda, not cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    rows_RD, weight_EDF, offsets_e = factors([4, 2], 20, 8)
    codes_RD, scales_R1 = encode(rows_RD, "fp8")
    weight, scales_EF = quantize_weight(weight_EDF)
    given = dict(codes=codes_RD, scales=scales_R1[:, 0], weight=weight, weight_scales=scales_EF, offsets=offsets_e)
    impl = change.get("impl", "auto")
    given.update({name: value for name, value in change.items() if name != "impl"})
    with pytest.raises(ValueError, match=text):
        scaled_grouped_mm(*given.values(), impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[128, 0, 77], [1, 2, 3, 4], [512]])
def test_torch_equals_the_reference_on_a_gpu(counts: list[int]) -> None:
    rows_RD, weight_EDF, offsets_e = (each.cuda() for each in factors(counts, 1024, 256))
    codes_RD, scales_R1 = split_wire(encode_rows(rows_RD.bfloat16(), "fp8", "token"), "fp8", "token", 1024)
    arguments = (codes_RD, scales_R1.squeeze(1), *quantize_weight(weight_EDF), offsets_e)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torch has the kernel for compute capability 9.0 alone")
    want = scaled_grouped_mm(*arguments, torch.float32, impl="reference")
    assert_close("product", scaled_grouped_mm(*arguments, impl="torch"), want, torch.bfloat16)
