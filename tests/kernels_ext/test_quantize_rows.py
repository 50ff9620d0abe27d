"""Rows to codes and back: scales, error bounds, zeros, tiny and huge rows, and what is refused.

Letters: R rows, D columns, G groups of columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.kernels_ext import npu
from moeweave.kernels_ext.quantize_rows import FORMATS, decode, encode, npu_impl
from moeweave.kernels_ext.tolerance import SQNR_FLOOR, sqnr


def rows_of(num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    r, d = torch.arange(num_rows, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)
    return (torch.sin(0.3 + 1.7 * r + 0.61 * d * (1 + r % 3)) * torch.exp2(r % 7 - 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 63])
@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(kind: str, num_rows: int, dtype: torch.dtype) -> None:
    rows_RD = rows_of(num_rows, 256, dtype)
    codes_RD, scales_RG = encode(rows_RD, kind)
    code = kind.removesuffix("_group128")
    groups, most = (2 if kind.endswith("_group128") else 1), {"int8": 127, "fp8": 448, "fp8_e5m2": 57344}[code]
    assert codes_RD.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[code]
    assert codes_RD.shape == rows_RD.shape
    assert scales_RG.dtype == torch.float32
    assert torch.equal(scales_RG, rows_RD.float().view(num_rows, groups, 256 // groups).abs().amax(-1) / most)
    got = decode(codes_RD, scales_RG, torch.float32)
    if num_rows:
        assert sqnr(got, rows_RD.float()) > SQNR_FLOOR[kind][0]
    if kind == "int8":
        assert bool(((got - rows_RD.float()).abs() <= scales_RG * 0.50001).all())


def through(rows_RD: Tensor, kind: str) -> Tensor:
    return decode(*encode(rows_RD, kind), torch.float32)


def with_outliers(rows_RD: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """One column in 256 `factor` times as large; and which columns are the others."""
    large = torch.arange(rows_RD.shape[1]) % 256 == 0
    return torch.where(large, rows_RD * factor, rows_RD), ~large


@pytest.mark.parametrize("dim", [256, 2048, 7168])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_table_of_floors(kind: str, dim: int) -> None:
    normal, outliers, others = SQNR_FLOOR[kind]
    rows_RD = torch.randn(128, dim)
    assert sqnr(through(rows_RD, kind), rows_RD) > normal
    rows_RD, small = with_outliers(rows_RD, 50.0)
    got = through(rows_RD, kind)
    assert sqnr(got, rows_RD) > outliers
    assert sqnr(got[:, small], rows_RD[:, small]) > others


@pytest.mark.parametrize("kind", FORMATS)
def test_the_floors_are_no_lower_than_they_need_be(kind: str) -> None:
    rows_RD = torch.randn(128, 7168)
    assert sqnr(through(rows_RD, kind), rows_RD) < SQNR_FLOOR[kind][0] + 1.5


def gradient_like(way: str) -> Tensor:
    """Rows as gradients have them: a size of its own for each, and tails that a normal distribution lacks."""
    sizes_R1 = torch.exp2(torch.empty(128, 1).uniform_(-40, -8))
    if way == "student":
        return torch.distributions.StudentT(2.0).sample((128, 2048)) * sizes_R1
    if way == "lognormal":
        return torch.randn(128, 2048) * torch.exp(2 * torch.randn(128, 2048)) * sizes_R1
    hidden = torch.randn(128, 2048, requires_grad=True)
    logits = torch.nn.functional.silu(hidden @ torch.randn(2048, 512) / 45) @ torch.randn(512, 1000)
    torch.nn.functional.cross_entropy(logits, torch.randint(1000, (128,))).backward()
    assert hidden.grad is not None
    return hidden.grad


@pytest.mark.parametrize("scale", ["", "_group128"])
@pytest.mark.parametrize("way", ["student", "lognormal", "backward"])
def test_e4m3_keeps_more_of_gradients_than_e5m2(way: str, scale: str) -> None:
    rows_RD = gradient_like(way)
    e4m3, e5m2 = (sqnr(through(rows_RD, f"fp8{part}{scale}"), rows_RD) for part in ("", "_e5m2"))
    assert e4m3 > e5m2 + 3


def test_e5m2_keeps_columns_that_e4m3_loses() -> None:
    rows_RD, small = with_outliers(torch.randn(64, 2048), 1e6)
    assert sqnr(through(rows_RD, "fp8")[:, small], rows_RD[:, small]) < 1
    assert sqnr(through(rows_RD, "fp8_e5m2")[:, small], rows_RD[:, small]) > SQNR_FLOOR["fp8_e5m2"][0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_holds_a_value_that_is_not_finite_is_nan(kind: str, value: float) -> None:
    rows_RD = rows_of(4, 256)
    want = through(rows_RD, kind)
    rows_RD[2, 130] = value
    got = through(rows_RD, kind)
    end = 128 if kind.endswith("_group128") else 0
    assert bool(got[2, end:].isnan().all()), "the whole row, or the whole group"
    want[2, end:] = got[2, end:]
    assert torch.equal(got.nan_to_num(), want.nan_to_num()), "nothing else"
    assert bool((encode(rows_RD, kind)[0][2, end:].float() == 0).all())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
@pytest.mark.parametrize("kind", FORMATS)
def test_zero_tiny_and_huge_rows_have_no_nan(kind: str, value: float) -> None:
    rows_RD = torch.full((2, 128), value)
    rows_RD[1, 1:] = 0
    codes_RD, scales_RG = encode(rows_RD, kind)
    got = decode(codes_RD, scales_RG, torch.float32)
    assert bool((scales_RG > 0).all())
    assert bool(torch.isfinite(got).all())
    assert bool((got[1, 1:] == 0).all())
    assert bool(((got - rows_RD).abs() <= scales_RG * (4096 if "e5m2" in kind else 1)).all())


def test_the_worked_example() -> None:
    codes, scales = encode(torch.tensor([[-2.54, 1.27]]))
    assert codes.tolist() == [[-127, 64]]
    assert scales.item() == pytest.approx(0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_table_gives_the_bits_of_the_conversion(code: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(code).repeat(3, 1)
    scales_RG = torch.tensor([[1.0, 0.3], [1e-30, 7.7], [float("nan"), 0.5]])
    for codes_RD in (every, every[:0], every.t().contiguous().t()):
        found = [
            decode(codes_RD, scales_RG[: len(codes_RD)], dtype, impl=impl) for impl in ("table", "reference", "auto")
        ]
        assert found[0].dtype == dtype
        assert torch.equal(found[0].isnan(), found[1].isnan())
        assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
        assert torch.equal(found[0].nan_to_num(), found[2].nan_to_num())


def test_the_table_is_for_fp8() -> None:
    with pytest.raises(ValueError, match=r"it is for fp8, not torch.int8"):
        decode(torch.ones(1, 4, dtype=torch.int8), torch.ones(1, 1), impl="table")


def test_int8_on_an_npu_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated: the operator gives codes and a scale a row, and zeros for a row of zeros."""

    def dynamic_quant(name: str, **arguments: Any) -> tuple[Tensor, Tensor]:
        assert name == "npu_dynamic_quant"
        wide = arguments["input"].float()
        scales_R = wide.abs().amax(1) / 127
        return (wide / scales_R[:, None]).nan_to_num().round().to(torch.int8), scales_R

    monkeypatch.setattr(npu, "call", dynamic_quant)
    rows_RD = torch.cat([rows_of(5, 64, torch.bfloat16), torch.zeros(1, 64, dtype=torch.bfloat16)])
    for got, want in zip(npu_impl.encode(rows_RD, "int8"), encode(rows_RD, impl="reference"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "rows, given, text",
    [
        (torch.ones(1, 4), dict(kind="int4"), r"kind \('int4'\) must be one of int8, fp8, fp8_e5m2, fp8_group128"),
        (torch.ones(4), {}, r"must be floating point \[R, D\]"),
        (torch.ones(1, 4, dtype=torch.int32), {}, r"must be floating point"),
        (torch.ones(1, 130), dict(kind="fp8_group128"), r"columns \(130\) must be a multiple of 128 .* Use kind='fp8'"),
        (torch.ones(1, 64), dict(kind="fp8_e5m2_group128"), r"Use kind='fp8_e5m2'"),
        (torch.ones(1, 4, dtype=torch.bfloat16), dict(impl="npu"), r"it is for npu, not cpu"),
    ],
)
def test_what_does_not_fit_is_refused(rows: Tensor, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        encode(rows, **given)
