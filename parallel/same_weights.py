"""Ranks that built different models: nothing is broadcast, so each would keep shards of weights of its own."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.parallel.mesh import Mesh

SAMPLES = 64  # elements looked at of each parameter


def check_same_weights(model: nn.Module, mesh: Mesh) -> None:
    """Raise ValueError on all ranks where they were given different weights, by a sample of every parameter.

    Collective. Parameters on meta, and those that are no plain tensors, are left out.
    """
    if mesh.world == 1:
        return
    found = _digest(model)
    least_and_most = torch.tensor([-found, found], dtype=torch.int64, device=mesh.device)
    dist.all_reduce(least_and_most, op=dist.ReduceOp.MAX)
    if -int(least_and_most[0]) != int(least_and_most[1]):
        raise ValueError(
            f"the ranks were given different weights of {type(model).__name__}, and none are broadcast. Call "
            "torch.manual_seed with one number on all ranks before the model is built, or load the same weights."
        )


def _digest(model: nn.Module) -> int:
    """63 bits of the names and samples of all parameters."""
    digest = hashlib.blake2b(digest_size=8)
    for name, param in model.named_parameters():
        values = param.detach()
        if values.is_meta or type(values) is not Tensor or not values.numel():
            continue
        digest.update(name.encode())
        digest.update(_sample(values).cpu().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def _sample(values: Tensor) -> Tensor:
    """Up to `SAMPLES` elements, spread over the whole: [n]."""
    flat = values.reshape(-1) if values.is_contiguous() else values[0].reshape(-1)
    step = max(flat.numel() // SAMPLES, 1)
    return flat[::step][:SAMPLES].contiguous()
