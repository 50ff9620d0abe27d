"""What a row looks like on the link: as it is, or quantised with its scale in the same message.

A wire row is one run of bytes, so that one copy moves a token and everything that its reader needs:

    | codes, a byte a column | zeros to a multiple of 4 | float32 scales | zeros to a multiple of 16 |

A row size that is a multiple of 16 keeps every row of a buffer where a GPU stores 16 bytes at once. Format "none" is
the row's own bytes and nothing else. Example, fp8, D 20, one scale: 20 + 4 = 24 bytes, a wire row of 32.

A row (a group of columns, with group scales) that holds a NaN or an infinity arrives as NaN throughout: loud, and never
a wrong finite number. A row of zeros arrives as zeros. The functions are plain functions of data, without a gradient:
straight-through belongs to the dispatcher that sends.

Legend: R rows, D columns, B bytes of a wire row, G scales of a row (1, or D / 128).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moeweave.kernels_ext import quantize_rows
from moeweave.kernels_ext.quantize_rows import CODES, GROUP

FORMATS = ("none", "fp8", "fp8_e5m2", "int8")
SCALES = ("token", "group128")
EXCHANGES = ("dispatch", "combine", "dispatch_backward", "combine_backward")
ALIGN = 16  # bytes


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Which format each of the four exchanges of a layer sends.

    Attributes:
        dispatch: tokens to their experts.
        combine: results of the experts back to the tokens.
        dispatch_backward: gradients of the rows that dispatch sent, on their way back.
        combine_backward: gradients of the output, on their way to the experts.
        scale: "token", one a row; "group128", one for each 128 columns, for fp8 formats.

    Formats are "none", "fp8" (e4m3), "fp8_e5m2" and "int8". Where a backward format is "none" the gradient goes back as
    if nothing had been coded (straight-through).

    Raises:
        ValueError: an unknown format or scale; group scales without fp8, or beside int8.
    """

    dispatch: str = "none"
    combine: str = "none"
    dispatch_backward: str = "none"
    combine_backward: str = "none"
    scale: str = "token"

    def __post_init__(self) -> None:
        for exchange in EXCHANGES:
            _one_of(f"Codec.{exchange}", getattr(self, exchange), FORMATS)
        _one_of("Codec.scale", self.scale, SCALES)
        coded = {exchange: kind for exchange in EXCHANGES if (kind := getattr(self, exchange)) != "none"}
        if self.scale == "group128" and (not coded or "int8" in coded.values()):
            shown = ", ".join(f"{exchange}={kind!r}" for exchange, kind in coded.items()) or "all 'none'"
            raise ValueError(
                f"Codec.scale ('group128') must go with fp8 formats only, the formats are {shown}. "
                "Set scale='token', or the formats to 'fp8'."
            )

    @property
    def for_dispatch(self) -> tuple[str, str, str]:
        """Format of the rows, format of their gradients, scale: what the operators that dispatch take."""
        return self.dispatch, self.dispatch_backward, self.scale

    @property
    def for_combine(self) -> tuple[str, str, str]:
        """The same for the operators that combine."""
        return self.combine, self.combine_backward, self.scale

    @classmethod
    def parse(cls, value: Any) -> Codec:
        """A codec from what a config holds.

        value: None or "none"; a format, which is that of `dispatch` alone; a mapping of fields; or a Codec.
        Raises ValueError on anything else.
        """
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if isinstance(value, str):
            _one_of("codec", value, FORMATS)
            return cls(dispatch=value)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"codec ({value!r}) must be one of {', '.join(FORMATS)}, a mapping of Codec's fields, or a Codec. "
                "Set codec='fp8' to quantise what dispatch sends."
            )
        known = [field.name for field in fields(cls)]
        for name in value:
            _one_of("codec's field", name, known)
        return cls(**{str(name): part for name, part in value.items()})

    def __str__(self) -> str:
        """The short form where there is one: "fp8"; else "dispatch=fp8 combine=int8"."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: part for name, part in parts.items() if part not in ("none", "token")}
        if set(changed) <= {"dispatch"}:
            return self.dispatch
        return " ".join(f"{name}={part}" for name, part in changed.items())


def wire_width(format: str, scale: str, width: int, dtype: torch.dtype) -> int:
    """B: bytes of the wire row of `width` columns of `dtype`. Raises ValueError where the scale does not fit."""
    _one_of("format", format, FORMATS)
    if format == "none":
        return width * dtype.itemsize
    return _align(scales_at(width) + 4 * num_scales(scale, width), ALIGN)


def num_scales(scale: str, width: int) -> int:
    """G: scales of a row. Raises ValueError on group scales of a width that is no multiple of the group."""
    _one_of("scale", scale, SCALES)
    if scale == "token":
        return 1
    if width % GROUP:
        legal = [n for n in (width // GROUP * GROUP, _align(width, GROUP)) if n]
        raise ValueError(
            f"width ({width}) must be a multiple of {GROUP} with scale='group128'. "
            f"Set scale='token', or a width of {' or '.join(map(str, legal))}."
        )
    return width // GROUP


def scales_at(width: int) -> int:
    """Offset in bytes of the scales in a wire row."""
    return _align(width, 4)


def encode_rows(rows_RD: Tensor, format: str, scale: str) -> Tensor:
    """Rows [R, D] of a floating dtype -> wire rows uint8 [R, B]; format "none" is a view where the rows are contiguous.

    Row [448.0, -224.0] in fp8 is the bytes 126 (448), 246 (-224), 0, 0, then 1.0 as float32, then 8 zeros.
    """
    rows_RD = rows_RD.detach()
    num_rows, width = rows_RD.shape
    size = wire_width(format, scale, width, rows_RD.dtype)
    if format == "none":
        return rows_RD.contiguous().view(torch.uint8)
    wire_RB = rows_RD.new_zeros(num_rows, size, dtype=torch.uint8)
    for part, values in zip(split_wire(wire_RB, format, scale, width), _quantized(rows_RD, format, scale), strict=True):
        part.copy_(values)
    return wire_RB


def split_wire(wire_RB: Tensor, format: str, scale: str, width: int) -> tuple[Tensor, Tensor]:
    """Views of wire rows: codes [R, D] in the format's dtype, scales float32 [R, G]. Not for format "none"."""
    _one_of("format", format, tuple(CODES))
    start = scales_at(width)
    scales_RG = wire_RB[:, start : start + 4 * num_scales(scale, width)].view(torch.float32)
    return wire_RB[:, :width].view(CODES[format]), scales_RG


def decode_rows(wire_RB: Tensor, format: str, scale: str, width: int, dtype: torch.dtype) -> Tensor:
    """Wire rows uint8 [R, B] -> rows [R, D] in `dtype`: code times scale in float32, rounded once."""
    if format == "none":
        return wire_RB.view(dtype)
    return quantize_rows.decode(*split_wire(wire_RB, format, scale, width), dtype)


def _quantized(rows_RD: Tensor, format: str, scale: str) -> tuple[Tensor, Tensor]:
    return quantize_rows.encode(rows_RD, f"{format}_group128" if scale == "group128" else format)


def _align(size: int, step: int) -> int:
    return -(-size // step) * step


def _one_of(field: str, value: Any, legal: Iterable[str]) -> None:
    legal = list(legal)
    if value in legal:
        return
    near = difflib.get_close_matches(str(value), legal, n=1, cutoff=0.5)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Use {legal[0]!r} or another of them."
    raise ValueError(f"{field} ({value!r}) must be one of {', '.join(legal)}. {remedy}")
