"""Gradients of wrapped models, for comparing a plan that overlaps with one that does not, and bytes of reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import hf_zoo
import plain_models
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan


def build(name: str) -> torch.nn.Module:
    return plain_models.build(name) if name in plain_models.BLOCKS else hf_zoo.build(name)


def batch_of(name: str, rank: int, rows: int) -> dict[str, Tensor]:
    make: Any = plain_models.make_batch if name in plain_models.BLOCKS else lambda *a: hf_zoo.make_batch(name, *a)
    return make(rank, rows)


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


def gradients(
    name: str, sizes: dict[str, int], plan: dict[str, Any], microbatches: int, rows: tuple[int, ...], passes: int = 1
) -> dict[str, Tensor]:
    """Loss and gradients of this rank, of each of `passes` of forward_backward."""
    mesh = Mesh(**sizes)
    model = parallelize(build(name), mesh, Plan(**plan))
    found = {}
    for step in range(passes):
        batch = batch_of(name, mesh.data_rank + 10 * step, rows[min(mesh.rank, len(rows) - 1)])
        found[f"loss {step}"] = forward_backward(model, batch, microbatches)
        found |= {f"{key} {step}": local(p.grad) for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return found


class ReducedBytes(TorchDispatchMode):
    """Counts what ranks hand to reductions of gradients; losses and votes are smaller than any gradient here."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__:
            given = args[1] if "scatter" in func.__name__ else args[0]
            sizes = [each.numel() * each.element_size() for each in (given if isinstance(given, list) else [given])]
            self.num_bytes += sum(size for size in sizes if size > 64)
        return func(*args, **(kwargs or {}))
