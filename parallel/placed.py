"""Experts in the slots that a plan names (`Plan.placement`), and not in the order of their ids.

Rank r of `ep` holds the experts of slots [r n, (r + 1) n). The router, loads, losses, names and everything that is
saved speak of experts; only the exchange of tokens, and the memory of a rank, speak of slots:

    1. parallelize   a rank keeps the experts of its slots
    2. each call     ids of experts become those of slots, after load was counted and capacity applied
    3. save, load    a rank's rows are cut into the experts that they are (`hf.boxes`), so a checkpoint or folder does
                     not depend on a placement, and is the place to change it

Several slots of one expert (replicas) share out its tokens in turns: a token's turn follows from its place among the
tokens of its rank, so that a backward pass and a recomputation find the same slot. Their gradients are summed
(`replicas`).

Legend: E experts, S slots, C slots of an expert at most, T tokens here, K routes a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.hf.boxes import Slots
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.placement import invert

Placements = Mapping[str, Slots]


def parse_placement(given: str | Path | Mapping[str, Sequence[int]] | None) -> Placements | None:
    """What `Plan.placement` says: the expert of each slot, by path of the experts. A string is a JSON file of it.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    if given is None:
        return None
    where = "" if isinstance(given, Mapping) else f" ({given})"
    try:
        table: Any = given if isinstance(given, Mapping) else json.loads(Path(given).read_text())
        return {str(path): tuple(_whole(expert) for expert in slots) for path, slots in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Plan.placement{where} must map paths of experts to the expert of each slot, as whole numbers: {error}. "
            "Make it with `python -m moeweave.launch.place`, or mw.place_by_load."
        ) from error


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def place_blocks(blocks: list[MoEBlock], placement: Any, sizes: MeshSizes) -> list[MoEBlock]:
    """`blocks` with the slots of `placement`, the plan's.

    Raises:
        ValueError: ep of one rank; experts without slots, or in none; slots that ep does not divide; experts whose
            weights are not in packed or stacked tensors.
    """
    placements = parse_placement(placement)
    if placements is None:
        return blocks
    if sizes.ep == 1:
        raise ValueError("Plan.placement needs ep > 1: one rank holds all experts. Set ep, or placement=None.")
    placed = []
    for block in blocks:
        if block.kind == "modulelist":
            raise ValueError(
                f"Plan.placement needs experts in tensors, and {block.path} is a list. Set placement=None."
            )
        slots = placements.get(block.path)
        if slots is None:
            raise ValueError(
                f"Plan.placement has no slots for {block.path}. It has: {', '.join(list(placements)[:5])}. "
                "Place by the load of this model."
            )
        _check_slots(block, slots, sizes.ep)
        placed.append(replace(block, slots=slots))
    return placed


def _check_slots(block: MoEBlock, slots: Slots, ep: int) -> None:
    if set(slots) != set(range(block.num_experts)):
        odd = sorted(set(range(block.num_experts)) ^ set(slots))
        raise ValueError(
            f"Plan.placement of {block.path} must give each of its {block.num_experts} experts a slot, and no other; "
            f"see {', '.join(map(str, odd[:5]))}. Place by the load of this model."
        )
    if len(slots) % ep:
        raise ValueError(
            f"ep ({ep}) must divide the slots of Plan.placement at {block.path} ({len(slots)}). Place for ep={ep}."
        )


class SlotTable:
    """Ids of experts -> ids of slots. Of several slots a token takes the one whose turn it is.

    Args:
        slots: the expert of each slot. first: whose turn it is at the first token; another one on every rank.
    """

    def __init__(self, slots: Slots, num_experts: int, first: int, device: torch.device) -> None:
        placement = invert(torch.tensor([slots]), num_experts)
        self.slots_EC = placement.slots_of_expert[0].to(device)
        self.num_replicas_E = placement.num_replicas[0].to(device)
        self.first = first

    def __call__(self, ids_TK: Tensor) -> Tensor:
        """int64 [T, K] -> int64 [T, K]; what is no expert becomes -1, not routed."""
        num_experts = self.slots_EC.shape[0]
        known_TK = ids_TK.clamp(0, num_experts - 1)
        turn_T1 = torch.arange(ids_TK.shape[0], device=ids_TK.device).unsqueeze(1) + self.first
        slots_TK = self.slots_EC[known_TK, turn_T1 % self.num_replicas_E[known_TK]]
        return torch.where((ids_TK >= 0) & (ids_TK < num_experts), slots_TK, -1)


def slots_of_params(model: nn.Module) -> dict[str, Slots]:
    """By name of a parameter, the expert of each row of the whole tensor: of those that a plan has placed."""
    record = vars(model).get("_moeweave")
    blocks: list[MoEBlock] = [] if record is None else record.blocks
    return {f"{block.path}.{name}": block.slots for block in blocks if block.slots is not None for name in block.params}


def slots_of_replicas(model: nn.Module) -> dict[str, Slots]:
    """The same of those with several slots for an expert."""
    return {name: slots for name, slots in slots_of_params(model).items() if len(set(slots)) < len(slots)}
