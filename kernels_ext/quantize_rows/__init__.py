"""Rows quantised with a scale of their own: int8 a token; fp8, e4m3 or e5m2, a token or a group of 128 columns.

`encode` and `decode` pick their implementations. Both are plain functions of data: straight-through gradients belong to
whoever sends the rows.
Letters: R rows, D columns, G groups of columns (1, or D / 128).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moeweave.kernels_ext.quantize_rows import npu_impl, reference, table_impl
from moeweave.kernels_ext.quantize_rows.reference import CODES, GROUP
from moeweave.kernels_ext.registry import Implementation, Op, select

__all__ = ["CODES", "DECODE", "FORMATS", "GROUP", "OP", "decode", "encode"]

FORMATS = ("int8", "fp8", "fp8_e5m2", "fp8_group128", "fp8_e5m2_group128")


class _QuantizeRows(Implementation, Protocol):
    def encode(self, rows_RD: Tensor, kind: str) -> tuple[Tensor, Tensor]: ...


class _DecodeRows(Implementation, Protocol):
    def decode(self, codes_RD: Tensor, scales_RG: Tensor, dtype: torch.dtype) -> Tensor: ...


OP: Op[_QuantizeRows] = Op("quantize_rows", (npu_impl, reference))
DECODE: Op[_DecodeRows] = Op("quantize_rows.decode", (table_impl, reference))


def encode(rows_RD: Tensor, kind: str = "int8", *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise each row: codes = rows / scales, scales = amax / 127 (int8), / 448 (fp8) or / 57344 (fp8_e5m2).

    rows_RD: [R, D], floating point; R may be 0.
    kind: "int8", "fp8" (e4m3), "fp8_e5m2", or one of the last two with "_group128" (D a multiple of 128).
    Returns codes [R, D], int8, float8_e4m3fn or float8_e5m2, and scales float32 [R, G], never zero; not finite,
    with codes 0, for what holds a NaN or an infinity.
    Raises ValueError on an unknown kind, another shape or dtype, or an impl that cannot run.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(FORMATS)}. Name one of them.")
    if rows_RD.dim() != 2 or not rows_RD.is_floating_point() or rows_RD.shape[1] == 0:
        raise ValueError(
            f"rows ({rows_RD.dtype}, {tuple(rows_RD.shape)}) must be floating point [R, D], D > 0. Reshape or cast."
        )
    if kind.endswith("_group128") and rows_RD.shape[1] % GROUP:
        raise ValueError(
            f"columns ({rows_RD.shape[1]}) must be a multiple of {GROUP} for {kind!r}. "
            f"Use kind={kind.removesuffix('_group128')!r}."
        )
    return select(OP, rows_RD, impl=_fitting(kind, impl)).encode(rows_RD, kind)


def decode(codes_RD: Tensor, scales_RG: Tensor, dtype: torch.dtype = torch.bfloat16, *, impl: str = "auto") -> Tensor:
    """Codes [R, D] and scales [R, G] -> rows [R, D] in `dtype`, multiplied in float32 and rounded once."""
    return select(DECODE, codes_RD, impl=_decoding(codes_RD, impl)).decode(codes_RD, scales_RG, dtype)


def _decoding(codes_RD: Tensor, impl: str) -> str:
    """Where the table does not apply there is nothing better to be told of."""
    return "reference" if impl == "auto" and table_impl.supports(codes_RD) else impl


def _fitting(kind: str, impl: str) -> str:
    """Only int8 has an implementation beside the reference."""
    return "reference" if impl == "auto" and kind != "int8" else impl
