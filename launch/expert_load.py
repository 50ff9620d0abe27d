"""Which experts a step's tokens went to: counted over all ranks, and how even that was."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import moeweave as mw
from moeweave.parallel.record import record_of


def of_step(model: nn.Module, mesh: mw.Mesh) -> dict[str, list[int]]:
    """Routes per expert since the last call over all tokens, by layer, those of every pipeline stage. Collective."""
    loads = mw.expert_load(model, reset=True)
    found: dict[str, list[int]] = {}
    if loads:
        sizes = [len(load_E) for load_E in loads.values()]
        total = torch.cat([load_E.to(mesh.device) for load_E in loads.values()])
        group = record_of(model).routing_group
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        found = dict(zip(loads, (part.tolist() for part in total.cpu().split(sizes)), strict=True))
    if mesh.sizes.pp == 1:
        return found
    stages: list[dict[str, list[int]]] = [{} for _ in range(mesh.sizes.pp)]
    dist.all_gather_object(stages, found, group=mesh.group("pp"))
    return {name: counts for stage in stages for name, counts in stage.items()}


def balance(load: dict[str, list[int]]) -> float | None:
    """Largest over mean load of a layer's experts, averaged over layers; None where nothing was routed."""
    ratios = [max(counts) * len(counts) / sum(counts) for counts in load.values() if sum(counts)]
    return round(sum(ratios) / len(ratios), 4) if ratios else None
