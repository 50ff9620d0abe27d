"""Wire rows: sizes, bytes, round trips against `quantize_rows`, rows that are not finite; the codec and its words.

Letters: R rows, D columns, B bytes of a wire row, G scales of a row.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.comm.codec import Codec, decode_rows, encode_rows, split_wire, wire_width
from moeweave.kernels_ext import quantize_rows

CODED = [(form, "token") for form in ("fp8", "fp8_e5m2", "int8")] + [("fp8", "group128"), ("fp8_e5m2", "group128")]


def rows_of(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    r, d = torch.arange(num_rows, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return (torch.sin(0.3 + 1.7 * r + 0.61 * d * (1 + r % 3)) * (r % 5)).to(dtype)  # every fifth row is zeros


@pytest.mark.parametrize(
    "form, scale, width, want",
    [
        ("none", "token", 7, 14),
        ("fp8", "token", 20, 32),
        ("fp8", "token", 1, 16),
        ("int8", "token", 12, 16),
        ("int8", "token", 13, 32),
        ("fp8", "token", 7168, 7168 + 16),
        ("fp8", "group128", 7168, 7168 + 4 * 56),
        ("fp8_e5m2", "group128", 128, 128 + 16),
    ],
)
def test_the_size_of_a_wire_row(form: str, scale: str, width: int, want: int) -> None:
    assert wire_width(form, scale, width, torch.bfloat16) == want
    assert encode_rows(rows_of(3, width, torch.bfloat16), form, scale).shape == (3, want)


def test_the_bytes_of_a_wire_row(nan_empty: None) -> None:
    codes, zeros = bytes([126, 246, 118]), bytes(1)
    want = codes + zeros + struct.pack("<f", 1.0) + bytes(8)
    assert bytes(encode_rows(torch.tensor([[448.0, -224.0, 224.0]]), "fp8", "token")[0].tolist()) == want
    scales = struct.pack("<ff", 2.0, 0.5) + bytes(8)
    row = torch.cat([torch.full((128,), 2 * 448.0), torch.full((128,), 0.5 * 448.0)])[None]
    assert bytes(encode_rows(row, "fp8", "group128")[0].tolist()) == bytes([126] * 256) + scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_rows", [0, 1, 63])
@pytest.mark.parametrize("form, scale", CODED)
def test_a_round_trip_is_that_of_the_quantised_rows(form: str, scale: str, num_rows: int, dtype: torch.dtype) -> None:
    for width in (256, 128) if scale == "group128" else (256, 20, 13, 1):
        rows_RD = rows_of(num_rows, width, dtype)
        wire_RB = encode_rows(rows_RD, form, scale)
        codes_RD, scales_RG = quantize_rows.encode(rows_RD, form + "_group128" * (scale == "group128"))
        got_codes, got_scales = split_wire(wire_RB, form, scale, width)
        assert got_codes.dtype == codes_RD.dtype
        assert torch.equal(got_codes.view(torch.uint8), codes_RD.view(torch.uint8))
        assert torch.equal(got_scales, scales_RG)
        got_RD = decode_rows(wire_RB, form, scale, width, dtype)
        assert got_RD.dtype == dtype
        assert torch.equal(got_RD, quantize_rows.decode(codes_RD, scales_RG, dtype))
        assert bool((got_RD[::5] == 0).all()), "rows of zeros"


def test_views_share_the_memory_of_the_wire() -> None:
    rows_RD = rows_of(4, 32)
    plain = encode_rows(rows_RD, "none", "token")
    assert plain.data_ptr() == rows_RD.data_ptr() == decode_rows(plain, "none", "token", 32, torch.float32).data_ptr()
    wire_RB = encode_rows(rows_RD, "fp8", "token")
    codes_RD, scales_RG = split_wire(wire_RB, "fp8", "token", 32)
    assert codes_RD.data_ptr() == wire_RB.data_ptr() == scales_RG.data_ptr() - 32
    assert codes_RD.stride() == (48, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_as_they_are_keep_every_bit(dtype: torch.dtype) -> None:
    rows_RD = rows_of(5, 7, dtype)
    rows_RD[2, 3], rows_RD[4, 1] = float("nan"), float("-inf")
    got = decode_rows(encode_rows(rows_RD.t().contiguous().t(), "none", "token"), "none", "token", 7, dtype)
    assert torch.equal(got.view(torch.uint8), rows_RD.view(torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form, scale", CODED)
def test_a_row_that_is_not_finite_arrives_as_nan(form: str, scale: str, value: float) -> None:
    rows_RD = rows_of(3, 128, torch.bfloat16)
    want_RD = decode_rows(encode_rows(rows_RD, form, scale), form, scale, 128, torch.bfloat16)
    rows_RD[1, 77] = value
    got_RD = decode_rows(encode_rows(rows_RD, form, scale), form, scale, 128, torch.bfloat16)
    assert bool(got_RD[1].isnan().all())
    assert torch.equal(got_RD[::2], want_RD[::2])


def test_encoding_has_no_gradient() -> None:
    rows_RD = rows_of(2, 16).requires_grad_()
    for form in ("none", "fp8"):
        assert not encode_rows(rows_RD, form, "token").requires_grad


@pytest.mark.parametrize(
    "value, want",
    [
        (None, Codec()),
        ("none", Codec()),
        ("fp8", Codec(dispatch="fp8")),
        ("int8", Codec(dispatch="int8")),
        ({}, Codec()),
        ({"combine": "int8"}, Codec(combine="int8")),
        ({"dispatch": "fp8", "scale": "group128"}, Codec(dispatch="fp8", scale="group128")),
        (Codec(combine_backward="fp8_e5m2"), Codec(combine_backward="fp8_e5m2")),
    ],
)
def test_parse(value: Any, want: Codec) -> None:
    assert Codec.parse(value) == want
    assert Codec.parse(want) is want


def test_words_of_a_codec() -> None:
    assert [str(Codec.parse(value)) for value in (None, "fp8", "int8")] == ["none", "fp8", "int8"]
    assert str(Codec(dispatch="fp8", scale="group128")) == "dispatch=fp8 scale=group128"
    assert str(Codec(combine_backward="fp8_e5m2")) == "combine_backward=fp8_e5m2"


@pytest.mark.parametrize(
    "value, text",
    [
        ("fp9", r"codec \('fp9'\) must be one of none, fp8, fp8_e5m2, int8\. Did you mean 'fp8'\?"),
        ("4 bits", r"codec \('4 bits'\) must be one of .* Use 'none' or another of them"),
        (8, r"codec \(8\) must be one of none, .* a mapping of Codec's fields, or a Codec\. Set codec='fp8'"),
        ({"dispach": "fp8"}, r"codec's field \('dispach'\) must be one of dispatch, .* Did you mean 'dispatch'\?"),
        ({"dispatch": "e5m2"}, r"Codec\.dispatch \('e5m2'\) must be one of .* Did you mean 'fp8_e5m2'\?"),
        ({"combine": None}, r"Codec\.combine \(None\) must be one of"),
        ({"dispatch": "fp8", "scale": "group64"}, r"Codec\.scale \('group64'\) .* Did you mean 'group128'\?"),
        (
            {"scale": "group128"},
            r"Codec\.scale \('group128'\) must go with fp8 formats only, the formats are all 'none'",
        ),
        (
            {"dispatch": "fp8", "combine": "int8", "scale": "group128"},
            r"the formats are dispatch='fp8', combine='int8'\. Set scale='token', or the formats to 'fp8'",
        ),
    ],
)
def test_what_is_no_codec_is_refused(value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Codec.parse(value)


def test_group_scales_need_whole_groups() -> None:
    text = r"width \(200\) must be a multiple of 128 with scale='group128'\. Set scale='token', or .* 128 or 256"
    for call in (wire_width, lambda *args: encode_rows(rows_of(1, 200), *args[:2])):
        with pytest.raises(ValueError, match=text):
            call("fp8", "group128", 200, torch.float32)
