"""Expanding and reducing rows in plain PyTorch, on any device: sorts and prefix sums, never atomics.

Letters: N tokens, K routes a token, D width, R = N * K rows, e experts here, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "reference"


def supports(*tensors: Tensor) -> str | None:
    """Return None: this one runs everywhere."""
    return None


def expand(
    x_ND: Tensor, scales_N: Tensor | None, ids_NK: Tensor, experts: tuple[int, int], num_experts: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return rows_RD, scales_R, place_R, offsets_e; rows past the last are copies of tokens that go elsewhere."""
    first, end = experts
    key_R = ids_NK.reshape(-1)
    key_R = torch.where((key_R >= first) & (key_R < end), key_R - first, end - first)
    order_R = torch.argsort(key_R, stable=True)
    place_R = torch.empty_like(order_R).index_copy_(0, order_R, arange_like(order_R, order_R.shape[0]))
    ends = torch.arange(1, end - first + 1, device=key_R.device)
    offsets_e = torch.searchsorted(key_R.index_select(0, order_R), ends).to(torch.int32)
    source_R = order_R // ids_NK.shape[1]
    scales_R = None if scales_N is None else scales_N.index_select(0, source_R)
    return x_ND.index_select(0, source_R), scales_R, place_R, offsets_e


def reduce(rows_RD: Tensor, place_R: Tensor, weights_NK: Tensor) -> Tensor:
    """Return the sums, in float32 in increasing k, rounded once."""
    num_tokens, top_k = weights_NK.shape
    place_NK = place_R.view(num_tokens, top_k)
    total_ND = torch.zeros(num_tokens, rows_RD.shape[1], device=rows_RD.device)
    for k in range(top_k):
        total_ND.addcmul_(rows_RD.index_select(0, place_NK[:, k]).float(), weights_NK[:, k, None].float())
    return total_ND.to(rows_RD.dtype)


def arange_like(x: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=x.device)
