"""Activation checkpointing that replays routing instead of computing it anew.

A recomputed router may pick other experts than the first time (ties, non-deterministic kernels): rows would then be
multiplied by the wrong experts' gradients. So the choices (top-k) and the layouts made from them are kept from the
forward pass, which also spares the exchange of counts; everything else is recomputed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def _kept() -> list[Any]:
    ops = torch.ops
    return [
        ops.aten.topk.default,
        ops.aten.sort.default,
        ops.aten.sort.stable,
        ops.moeweave.exchange_layout.default,
        ops.moeweave.gather_layout.default,
    ]


def replay_routing() -> tuple[Any, Any]:
    """`context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: keep routing, recompute the rest."""
    kept = set(_kept())

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_recompute(model: nn.Module, units: list[nn.Module]) -> None:
    """Checkpoint the activations of every unit: by the model's own switch where it has one, else around each forward."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None and getattr(model, "supports_gradient_checkpointing", False):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": replay_routing})
        return
    for unit in units:
        unit.forward = functools.partial(
            checkpoint, unit.forward, use_reentrant=False, context_fn=replay_routing
        )
