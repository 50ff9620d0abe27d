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
from moeweave.kernels_ext.tolerance import sqnr


def rows_of(num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    r, d = torch.arange(num_rows, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)
    return (torch.sin(0.3 + 1.7 * r + 0.61 * d * (1 + r % 3)) * torch.exp2(r % 7 - 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 63])
@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(kind: str, num_rows: int, dtype: torch.dtype) -> None:
    rows_RD = rows_of(num_rows, 256, dtype)
    codes_RD, scales_RG = encode(rows_RD, kind)
    groups, most = (2 if kind == "fp8_group128" else 1), (127 if kind == "int8" else 448)
    assert codes_RD.dtype == (torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    assert codes_RD.shape == rows_RD.shape
    assert scales_RG.dtype == torch.float32
    assert torch.equal(scales_RG, rows_RD.float().view(num_rows, groups, 256 // groups).abs().amax(-1) / most)
    got = decode(codes_RD, scales_RG, torch.float32)
    if num_rows:
        assert sqnr(got, rows_RD.float()) > (35 if kind == "int8" else 28)
    if kind == "int8":
        assert bool(((got - rows_RD.float()).abs() <= scales_RG * 0.50001).all())


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
    assert bool(((got - rows_RD).abs() <= scales_RG).all())


def test_the_worked_example() -> None:
    codes, scales = encode(torch.tensor([[-2.54, 1.27]]))
    assert codes.tolist() == [[-127, 64]]
    assert scales.item() == pytest.approx(0.02)


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
        (torch.ones(1, 4), dict(kind="int4"), r"kind \('int4'\) must be one of int8, fp8, fp8_group128"),
        (torch.ones(4), {}, r"must be floating point \[R, D\]"),
        (torch.ones(1, 4, dtype=torch.int32), {}, r"must be floating point"),
        (torch.ones(1, 130), dict(kind="fp8_group128"), r"columns \(130\) must be a multiple of 128"),
        (torch.ones(1, 4, dtype=torch.bfloat16), dict(impl="npu"), r"it is for npu, not cpu"),
    ],
)
def test_what_does_not_fit_is_refused(rows: Tensor, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        encode(rows, **given)
