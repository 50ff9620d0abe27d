"""One global gradient norm over parameters that live on different meshes, each logical parameter counted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moeweave.parallel.data import shard_again
from moeweave.parallel.hf.boxes import Slots
from moeweave.parallel.names import copied_names
from moeweave.parallel.placed import slots_of_replicas
from moeweave.parallel.record import Record, record_of
from moeweave.parallel.replicas import counted_slots


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`.

    Collective: every rank calls it. With a ZeRO engine the gradients are scaled in its next step, by the same norm.

    Args:
        model: from `parallelize`, after backward.
        max_norm: positive. norm_type: p of the norm, or inf.

    Returns:
        The norm before scaling, float32 scalar (float64 of float64 gradients), equal on every rank.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm ({max_norm}) must be positive. Use float('inf') to measure without clipping.")
    record = record_of(model)
    if record.plan.zero_stage is not None:
        return _clip_by_engine(record, max_norm, norm_type)
    shard_again(model)
    named = [(name, param.grad) for name, param in model.named_parameters() if param.grad is not None]
    copies = copied_names(model)
    slots, experts = slots_of_replicas(model), {"ep": record.mesh.group("ep")}
    counted = [
        (grad, sharding_groups(grad) | (experts if _is_rank_local(name, record) else {}), slots.get(name))
        for name, grad in named
        if name not in copies
    ]
    stages = record.mesh.group("pp") if record.mesh.sizes.pp > 1 else None
    norm = global_norm(counted, norm_type, record.mesh.device, stages)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for _, grad in named:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.device, local.dtype))
    return norm


def _clip_by_engine(record: Record, max_norm: float, norm_type: float) -> Tensor:
    if norm_type != 2.0:
        raise ValueError(
            f"norm_type ({norm_type}) must be 2 with Plan(data={record.plan.data!r}): DeepSpeed clips by it."
        )
    if record.zero is None:
        raise RuntimeError("the model has no engine yet: call mw.prepare_optimizer(model, optimizer) first.")
    norm: Tensor = record.zero.clip(max_norm)
    return norm


def _is_rank_local(name: str, record: Record) -> bool:
    """True for the parameters of experts in a ModuleList: other ranks hold other ones, under other names."""
    if record.mesh.sizes.ep == 1:
        return False
    return any(name.startswith(f"{b.path}.") for b in record.blocks if b.kind == "modulelist")


def global_norm(
    grads: Sequence[tuple[Tensor, dict[str, dist.ProcessGroup], Slots | None]],
    p: float,
    device: torch.device,
    stages: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum |g|^p over local shards, then over exactly the mesh axes that shard them. A collective.

    Args:
        grads: each with the groups that its shards are spread over, by axis (`sharding_groups`), and the slots of an
            expert with replicas.
        p: of the norm, or inf.
        device: of the answer, a scalar of float32 (float64 of float64 gradients).
        stages: ranks that hold other parameters altogether, None if there are none.
    """
    infinite = p == float("inf")
    narrow = torch.float64 if any(grad.dtype == torch.float64 for grad, _, _ in grads) else torch.float32
    # On a CPU a sum of many float32 squares is off by 1e-3 at 20 million elements.
    wide = torch.float64 if device.type == "cpu" else narrow
    totals: dict[tuple[str, ...], Tensor] = {}
    groups: dict[tuple[str, ...], list[dist.ProcessGroup]] = {}
    for grad, sharding, slots in grads:
        # Axis names are the same on every rank, and so is their order: the collectives below line up.
        key = tuple(sorted(sharding))
        groups[key] = list(sharding.values())
        value = _local_norm(grad, p, wide, slots).to(device)
        term = value if infinite else value**p
        before = totals.get(key, _zero(device, wide))
        totals[key] = torch.maximum(before, term) if infinite else before + term
    total = _zero(device, wide)
    for key in sorted(totals):
        part = totals[key]
        for group in groups[key]:
            dist.all_reduce(part, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=group)
        total = torch.maximum(total, part) if infinite else total + part
    if stages is not None:
        dist.all_reduce(total, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=stages)
    return (total if infinite else total ** (1.0 / p)).to(narrow)


def _local_norm(grad: Tensor, p: float, dtype: torch.dtype, slots: Slots | None) -> Tensor:
    """Norm of this rank's shard; of an expert's replicas the first counts."""
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    if not local.numel():
        return _zero(local.device, dtype)
    if slots is None:
        return torch.linalg.vector_norm(local, p, dtype=dtype)
    norm_n = torch.linalg.vector_norm(local.flatten(1), p, dim=1, dtype=dtype)
    return torch.linalg.vector_norm(norm_n.where(counted_slots(grad, slots), 0.0), p)


def _zero(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def sharding_groups(grad: Tensor) -> dict[str, dist.ProcessGroup]:
    """Axes over which the shards of a DTensor are spread, with their groups; its replicas count once."""
    if not isinstance(grad, DTensor):
        return {}
    mesh = grad.device_mesh
    return {
        (mesh.mesh_dim_names or ())[axis]: mesh.get_group(axis)
        for axis, placement in enumerate(grad.placements)
        if not isinstance(placement, Replicate) and mesh.size(axis) > 1
    }


def param_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Parameters for an optimizer, one group a mesh: fused and foreach optimizers refuse to mix them in one.

    Args:
        options: put into every group, e.g. lr=1e-3, weight_decay=0.1.

    Returns:
        Groups in a fixed order; only parameters that require gradients.

    Example:
        >>> optimizer = torch.optim.AdamW(mw.param_groups(model, lr=1e-3))
    """
    shard_again(model)
    groups: dict[Any, list[nn.Parameter]] = {}
    for param in model.parameters():
        if param.requires_grad:
            kind = param.device_mesh if isinstance(param, DTensor) else None
            groups.setdefault(kind, []).append(param)
    return [{"params": params, **options} for params in groups.values()]
