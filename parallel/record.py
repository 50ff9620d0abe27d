"""What `parallelize` knows about a model it has wrapped, kept on the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moeweave.moe.balance import bias_update
from moeweave.moe.layer import MoELayer
from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.data import GradSync
from moeweave.parallel.expert import ExpertCall
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.plan import Plan


@dataclass
class Record:
    """Attributes:
    mesh, plan, blocks: as wrapped.
    calls: the `ExpertCall` of each block, in the same order.
    layers: the model's own `MoELayer`s, whose balance losses are in the graph and not in the model's loss.
    top_k, aux_coef: of the model's own load-balancing loss.
    takes_num_items: the model divides its loss by `num_items_in_batch` if it is given.
    labels_shifted: position s of the labels is the label of position s, not of s - 1.
    num_items: `num_items_in_batch` of the call under way.
    aux_share: weight of the aux loss in the call under way (1 / micro-batches).
    splits_loss: the model's loss can be computed on shards of a sequence, label by label.
    balanced: the balance loss of the forward pass under way is the global one already.
    sequence: how the model's sequences are shared out (`SequenceSharing`), under sp and tp_sequence.
    pipeline: the `Pipeline` that runs the model's stages, under pp.
    grad_sync: reduces the gradients that neither FSDP nor DDP reduces.
    aux_checked: the model's aux loss was seen to follow the formula.
    generating: `generate` is under way, whose passes keep parameters gathered.
    zero: the `Zero` that drives DeepSpeed's engine, once `prepare_optimizer` has made it.
    """

    mesh: Mesh
    plan: Plan
    blocks: list[MoEBlock]
    calls: list[ExpertCall]
    layers: list[MoELayer]
    top_k: int = 1
    aux_coef: float = 0.0
    takes_num_items: bool = False
    labels_shifted: bool = False
    num_items: Tensor | None = None
    aux_share: float = 1.0
    aux_checked: bool = False
    splits_loss: bool = False
    balanced: bool = False
    sequence: Any = None
    pipeline: Any = None
    grad_sync: GradSync = field(default_factory=GradSync)
    generating: bool = False
    zero: Any = None

    @property
    def routing_group(self) -> dist.ProcessGroup:
        """The ranks that route different tokens of the global batch."""
        mesh = self.mesh
        return mesh.token_group if self.plan.tp_sequence and mesh.sizes.tp > 1 else mesh.loss_group


def record_of(model: nn.Module) -> Record:
    """The record of a wrapped model.

    Raises:
        ValueError: `model` has not been through `parallelize`.
    """
    record = vars(model).get("_moeweave")
    if record is None and hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} is what torch.compile returned. Pass the model that `parallelize` returned, and "
            "compile it in place, by model.compile()."
        )
    if record is None:
        raise ValueError(f"{type(model).__name__} is not wrapped yet: call moeweave.parallelize(model, mesh) first.")
    return record


def expert_load(model: nn.Module, *, reset: bool = False) -> dict[str, Tensor]:
    """Routes per expert of this rank's tokens since the last reset, by path of the experts: int64 [num_experts]. Under
    pp of the layers of this rank's stages."""
    record = record_of(model)
    load = {block.path: call.load_E.clone() for block, call in zip(record.blocks, record.calls, strict=True)}
    if reset:
        for call in record.calls:
            call.reset()
    return load


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float = 1e-3) -> None:
    """Balance experts without a loss: nudge every router's choice-only bias against the load of the last step.

    DeepSeek-V3's rule (arXiv 2412.19437, 2.1.2): an expert above the mean load of the global batch loses `rate`, one
    below gains it. Call it once after each optimizer step; micro-batches count together, evaluation and recomputation
    do not. Collective: every rank calls it.

    Args:
        model: from `parallelize`, with routers that hold an `e_score_correction_bias`.
        rate: size of the nudge.

    Raises:
        ValueError: no router of the model has such a bias.
    """
    record = record_of(model)
    biased = [(block, call) for block, call in zip(record.blocks, record.calls, strict=True) if block.correction_bias]
    if not biased and record.pipeline is not None:
        return  # another stage has the routers
    if not biased:
        raise ValueError(
            f"{type(model).__name__} has no router with an e_score_correction_bias to update. Use the auxiliary loss."
        )
    loads = torch.stack([call.step_E for _, call in biased])
    if record.routing_group.size() > 1:
        dist.all_reduce(loads, group=record.routing_group)
    for (block, call), load_E in zip(biased, loads, strict=True):
        assert block.correction_bias is not None
        path, name = block.correction_bias
        bias = getattr(model.get_submodule(path), name)
        delta = bias_update(load_E, rate).to(bias.dtype).view(bias.shape)
        if isinstance(bias, DTensor):
            delta = distribute_tensor(delta, bias.device_mesh, bias.placements, src_data_rank=None)
        bias.add_(delta)
        call.step_E.zero_()
