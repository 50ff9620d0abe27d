"""Counts routes per expert, once a route: activation checkpointing that runs the forward again does not count again."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("moeweave::count_routes", mutates_args=("load_E",))
def count_routes(load_E: Tensor, ids_TK: Tensor) -> None:
    """Add the routes of `ids_TK` (int64, out-of-range ids are not routed) to `load_E` (int64 [E]), in place."""
    if torch._C._current_graph_task_id() != -1:  # inside backward: a recomputation
        return
    num_experts = load_E.shape[0]
    ids = ids_TK.reshape(-1)
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    counts = torch.zeros(num_experts + 1, dtype=load_E.dtype, device=load_E.device)
    load_E += counts.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]


@count_routes.register_fake
def _(load_E: Tensor, ids_TK: Tensor) -> None:
    return None
