"""Ascend's operators that stay on one rank, written from torch-npu's documentation, and a process that has an NPU as
far as moeweave can tell.

What the documentation leaves open is hostile: rows past the last are NaN (int8: 99), scales of these are NaN.

Letters: N tokens, K routes a token, R = N * K rows, D columns in, F columns out, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moeweave.kernels_ext import npu
from npu_emulator import NpuEmulator

BFLOAT16, FLOAT16 = 15, 5  # of torch's dtypes, as output_dtype has them
NAN = float("nan")


class LocalEmulator(NpuEmulator):
    """A `Call` that runs every operator that the library calls."""

    def __call__(self, name: str, **arguments: Any) -> Any:
        if name not in OPERATORS:
            return super().__call__(name, **arguments)
        self.names.append(name)
        return OPERATORS[name](**arguments)


@contextmanager
def an_npu() -> Iterator[LocalEmulator]:
    """Registries take this process's tensors for an NPU's, and operators are emulated."""
    emulator = LocalEmulator()
    with patch.object(npu, "call", emulator), patch.object(npu, "not_on_npu", lambda *tensors: None):
        yield emulator


def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
    output_dtype: int | None = None,
) -> list[Tensor]:
    """One input and one weight: group_type 0 splits the rows of x, 2 the axis that is summed over; group_list holds
    ends. int8 is summed exactly, times both scales. What no group covers is NaN, as is an empty group's product."""
    assert (split_item, group_list_type, group_list.dtype) == (3, 0, torch.int64)
    (left,), (right,) = x, weight
    spans = list(pairwise([0, *group_list.tolist()]))
    if group_type == 2:
        products = [left[:, a:b].float() @ right[a:b].float() + (NAN if a == b else 0.0) for a, b in spans]
        return [torch.stack(products).to(left.dtype)]
    dtype = left.dtype
    if left.dtype == torch.int8:
        assert scale is not None and per_token_scale is not None and per_token_scale[0].dtype == torch.float32
        assert per_token_scale[0].shape == left.shape[:1] and scale[0].shape == (right.shape[0], right.shape[2])
        dtype = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float16}[scale[0].dtype]
        assert output_dtype == {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}[dtype]
    out = torch.full((left.shape[0], right.shape[2]), NAN, dtype=dtype)
    for group, (start, end) in enumerate(spans):
        product = left[start:end].double() @ right[group].double()
        if scale is not None and per_token_scale is not None:
            product = product * scale[0][group].double() * per_token_scale[0][start:end, None].double()
        out[start:end] = product.to(dtype)
    return [out]


def dynamic_quant(*, input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002  (the operator's name)
    """int8 codes and scale = amax / 127 of each row."""
    assert input.dtype in (torch.bfloat16, torch.float16)
    return _quantised(input.float())


def dequant_swiglu_quant(x: Tensor, *, activate_left: bool, quant_mode: int) -> tuple[Tensor, Tensor]:
    """Of bfloat16 and float16, which need no scales: swish of the left half times the right one, int8 a row."""
    assert x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] % 2 == 0 and quant_mode == 1 and activate_left
    left, right = x.float().chunk(2, dim=1)
    return _quantised(left * torch.sigmoid(left) * right)


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None,
    active_num: int,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the experts in range by expert, then route; the row of each route or -1; counts; scales of the rows."""
    assert (expert_tokens_num_type, expert_tokens_num_flag, quant_mode, row_idx_type) == (1, True, -1, 0)
    assert expert_idx.dtype == torch.int32 and active_num == expert_idx.numel() and x.shape[0] == expert_idx.shape[0]
    assert int(expert_idx.max()) < expert_num and int(expert_idx.min()) >= 0
    first, end = active_expert_range
    assert 0 <= first < end <= expert_num
    assert scale is None or (scale.dtype == torch.float32 and scale.shape == x.shape[:1])
    ids, top_k = expert_idx.flatten().tolist(), expert_idx.shape[1]
    routes = sorted((expert, route) for route, expert in enumerate(ids) if first <= expert < end)
    rows = torch.full((len(ids), x.shape[1]), 99 if x.dtype == torch.int8 else NAN).to(x.dtype)
    scales, places = torch.full((len(ids),), NAN), torch.full((len(ids),), -1, dtype=torch.int32)
    counts = torch.zeros(end - first, dtype=torch.int64)
    for row, (expert, route) in enumerate(routes):
        rows[row], places[route] = x[route // top_k], row
        counts[expert - first] += 1
        if scale is not None:
            scales[row] = scale[route // top_k]
    return rows, places, counts, scales


def token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, *, probs: Tensor) -> Tensor:
    """Weighted sum over k of the rows that each token's places name; places are all different."""
    num_tokens, top_k = probs.shape
    assert sorted_indices.dtype == torch.int32 and permuted_tokens.shape[0] == num_tokens * top_k
    assert sorted(sorted_indices.tolist()) == list(range(num_tokens * top_k)), "an index repeats, or is out of range"
    rows = permuted_tokens[sorted_indices.long()].float() * probs.reshape(-1, 1).float()
    return rows.view(num_tokens, top_k, -1).sum(1).to(permuted_tokens.dtype)


def gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None, k_group: int, group_count: int, group_select_mode: int, norm_type: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax (0) or sigmoid (1), a bias that only the choice sees, the best groups by their two best, the best k;
    sigmoid weights divided by their sum."""
    assert x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[1] <= 2048
    assert bias is None or (bias.dtype, bias.shape) == (x.dtype, x.shape[1:])
    assert 1 <= k <= x.shape[1] // group_count * k_group and group_select_mode == 1
    norm = torch.softmax(x.float(), 1) if norm_type == 0 else torch.sigmoid(x.float())
    choice = norm if bias is None else norm + bias.float()
    ids = []
    for row in choice.tolist():
        size = len(row) // group_count
        groups = [sorted(row[g * size : (g + 1) * size])[-2:] for g in range(group_count)]
        best = sorted(range(group_count), key=lambda g: -sum(groups[g]))[:k_group]
        ids.append(sorted((e for e in range(len(row)) if e // size in best), key=lambda e: -row[e])[:k])
    chosen = torch.tensor(ids, dtype=torch.int32)
    y = norm.gather(1, chosen.long())
    y = y / (y.sum(1, keepdim=True) + 1e-20) if norm_type == 1 else y
    return y.to(x.dtype), chosen, torch.empty_like(norm)


def _quantised(wide: Tensor) -> tuple[Tensor, Tensor]:
    scales = wide.abs().amax(1) / 127
    codes = torch.where(scales[:, None] > 0, wide / scales[:, None], 0.0).nan_to_num(99.0)
    return codes.round().clamp(-127, 127).to(torch.int8), scales


OPERATORS = {
    "npu_grouped_matmul": grouped_matmul,
    "npu_dynamic_quant": dynamic_quant,
    "npu_dequant_swiglu_quant": dequant_swiglu_quant,
    "npu_moe_init_routing_v2": init_routing_v2,
    "npu_moe_token_unpermute": token_unpermute,
    "npu_moe_gating_top_k": gating_top_k,
}
