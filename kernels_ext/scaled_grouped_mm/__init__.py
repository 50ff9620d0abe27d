"""Grouped matrix product of quantised rows with quantised weights: what coded rows of a dispatch go into, at inference.

`quantize_weight` makes the weights once, `scaled_grouped_mm` multiplies. Neither has a gradient.
Letters: R rows, E groups (experts), D columns in, F columns out, G scales of a row; offsets_e int32, exclusive ends.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moeweave.kernels_ext import quantize_rows
from moeweave.kernels_ext.registry import Implementation, Op, select
from moeweave.kernels_ext.scaled_grouped_mm import npu_impl, reference, torch_impl

__all__ = ["OP", "quantize_weight", "scaled_grouped_mm"]


class _ScaledGroupedMM(Implementation, Protocol):
    def forward(
        self,
        codes_RD: Tensor,
        scales_R: Tensor,
        weight_EDF: Tensor,
        scales_EF: Tensor,
        offsets_e: Tensor,
        dtype: torch.dtype,
    ) -> Tensor: ...


OP: Op[_ScaledGroupedMM] = Op("scaled_grouped_mm", (npu_impl, torch_impl, reference))


def quantize_weight(weight_EDF: Tensor, kind: str = "fp8") -> tuple[Tensor, Tensor]:
    """Weights to codes with one scale for each column out.

    weight_EDF: [E, D, F], floating point; a transposed view of [E, F, D] is read as it lies.
    kind: "fp8", "fp8_e5m2" or "int8" of `quantize_rows`.
    Returns codes [E, D, F], which lie as [E, F, D] (the layout that torch wants), and scales float32 [E, F].
    """
    num_groups, dim, width = weight_EDF.shape
    rows = weight_EDF.transpose(1, 2).contiguous().view(num_groups * width, dim)
    codes, scales = quantize_rows.encode(rows, kind)
    return codes.view(num_groups, width, dim).transpose(1, 2), scales.view(num_groups, width)


def scaled_grouped_mm(
    codes_RD: Tensor,
    scales_R: Tensor,
    weight_EDF: Tensor,
    scales_EF: Tensor,
    offsets_e: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    impl: str = "auto",
) -> Tensor:
    """Multiply each row by its group's weight: ``out[r, f] = (codes[r] @ weight[e, :, f]) * scales[r] * scales[e, f]``.

    Codes [2], [4], scales [0.5], [0.5], weight codes [[[3]]], scales [[10]], offsets [2] give [30], [60].

    codes_RD, scales_R: rows sorted by group as `Dispatched` has them; scales [R], or [R, G] of groups of columns.
    weight_EDF, scales_EF: of `quantize_weight`.
    offsets_e: [E] int32, ascending; a group may be empty, R may be 0.
    impl: "auto", or the name of an implementation ("npu", "torch", "reference").
    Returns rows [R, F] in `dtype`; rows past offsets_e[-1] are undefined.
    Raises ValueError on shapes that do not fit, or an impl that cannot run.
    """
    _validate(codes_RD, scales_R, weight_EDF, scales_EF, offsets_e)
    chosen = select(OP, codes_RD, scales_R, weight_EDF, impl=impl)
    return chosen.forward(codes_RD, scales_R, weight_EDF, scales_EF, offsets_e, dtype)


def _validate(codes_RD: Tensor, scales_R: Tensor, weight_EDF: Tensor, scales_EF: Tensor, offsets_e: Tensor) -> None:
    if codes_RD.dim() != 2 or weight_EDF.dim() != 3 or codes_RD.shape[1] != weight_EDF.shape[1]:
        raise ValueError(
            f"codes {tuple(codes_RD.shape)} must be [R, D] and weight {tuple(weight_EDF.shape)} [E, D, F], with one D. "
            "Quantise weight.transpose(-2, -1) for one stored as [E, out, in]."
        )
    num_groups, _, width = weight_EDF.shape
    if scales_R.shape[:1] != codes_RD.shape[:1] or scales_R.dim() > 2 or scales_EF.shape != (num_groups, width):
        raise ValueError(
            f"scales {tuple(scales_R.shape)} must be [R] or [R, G] and weight scales {tuple(scales_EF.shape)} [E, F], "
            f"R = {codes_RD.shape[0]}, E = {num_groups}, F = {width}. Pass those that came with the codes."
        )
    if offsets_e.dtype != torch.int32 or offsets_e.shape != (num_groups,):
        raise ValueError(
            f"offsets ({offsets_e.dtype}, {tuple(offsets_e.shape)}) must be int32 [E], E = {num_groups}. "
            "Pass counts.cumsum(0, dtype=torch.int32)."
        )
