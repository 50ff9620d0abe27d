"""What `parallelize` knows about a model it has wrapped, kept on the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.expert import ExpertCall
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.plan import Plan


@dataclass
class Record:
    """Attributes:
    mesh, plan, blocks: as wrapped.
    calls: the `ExpertCall` of each block, in the same order.
    top_k, aux_coef: of the model's own load-balancing loss.
    takes_num_items: the model divides its loss by `num_items_in_batch` if it is given.
    aux_share: weight of the aux loss in the call under way (1 / micro-batches).
    aux_checked: the model's aux loss was seen to follow the formula.
    """

    mesh: Mesh
    plan: Plan
    blocks: list[MoEBlock]
    calls: list[ExpertCall]
    top_k: int = 1
    aux_coef: float = 0.0
    takes_num_items: bool = False
    aux_share: float = 1.0
    aux_checked: bool = False


def record_of(model: nn.Module) -> Record:
    """The record of a wrapped model.

    Raises:
        ValueError: `model` has not been through `parallelize`.
    """
    record = vars(model).get("_moeweave")
    if record is None:
        raise ValueError(f"{type(model).__name__} is not wrapped yet: call moeweave.parallelize(model, mesh) first.")
    return record


def expert_load(model: nn.Module, *, reset: bool = False) -> dict[str, Tensor]:
    """Routes per expert of this rank's tokens since the last reset, by path of the experts: int64 [num_experts]."""
    record = record_of(model)
    load = {block.path: call.load_E.clone() for block, call in zip(record.blocks, record.calls, strict=True)}
    if reset:
        for call in record.calls:
            call.reset()
    return load
