"""A model of a config alone: built on meta, spread, and filled with random weights on each rank's own device.

No rank and no host ever holds it whole; every mesh, and transformers' own expert parallelism, gets the same weights.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

from moeweave.parallel.hf.boxes import box_slices, local_pieces, whole_shape
from moeweave.parallel.hf.build import model_class_of
from moeweave.parallel.hf.conversion import build_empty
from moeweave.parallel.materialize import materialize
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.names import named_state
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.placed import slots_of_params
from moeweave.parallel.plan import Plan


def random_model(config: Any, mesh: Mesh, plan: Plan, *, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The model of a transformers config over `mesh`, with random weights and torch's own attention. A collective.

    Raises ValueError for a model, mesh or plan that `parallelize` refuses.
    """
    model = build_empty(model_class_of(config), config, dtype, attn_implementation="sdpa")
    parallelize(model, mesh, plan)
    materialize(model, mesh.device, {})
    fill(model, seed, config.initializer_range, mesh.device)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, seed: int, std: float, device: torch.device) -> None:
    """Fills this rank's shards of all weights: vectors with ones, the rest from normal(0, std), by name and seed alone.

    A whole tensor at a time is drawn on the device, and what the rank holds of it is kept. Devices of one kind draw
    the same numbers.
    """
    placed = slots_of_params(model)
    for name, tensor in named_state(model).items():
        slots = placed.get(name)
        shape = whole_shape(tensor, slots)
        if len(shape) < 2:
            whole = torch.ones(shape, dtype=tensor.dtype, device=device)
        else:
            generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            whole = torch.empty(shape, dtype=tensor.dtype, device=device).normal_(0.0, std, generator=generator)
        for box, view in local_pieces(tensor, slots):
            view.copy_(whole[box_slices(box)])
