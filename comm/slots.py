"""Which row goes where in a window: slots from prefix sums, the same on every device.

A token with several experts on one rank goes there once. Slot s of rank w is the s-th token, in order, that has a route
to w, so the slot of every (token, rank) is a prefix sum over tokens: no atomics, no exchange, and two runs give the
same slots. The expert's rank then finds the rows of its experts by the slot that each route names.

Worked example, 2 ranks of 2 experts, ids [[3, 0], [0, 1], [2, -1]]: tokens 0 and 1 have routes to rank 0, tokens 0 and
2 to rank 1. slot_TW = [[0, 0], [1, 0], [1, 1]] (entries without a route mean nothing), slots_W = [2, 2]. Routes by
expert are 1, 2 (expert 0), 3 (expert 1), 4 (expert 2), 0 (expert 3), 5 (none): their slots are 0, 1, 1, 1, 0, and 4
rows travel for 5 routes.

Legend: T tokens here, K routes a token, N = T * K routes, W ranks, S slots sent by this rank, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeweave.comm.layout import sort_routes

EPOCHS = 1 << 32


def later_epoch(epoch: int, rounds: int = 1) -> int:
    """The epoch `rounds` after (before, if negative) `epoch`, in 32 bits. Epochs are compared for equality only."""
    return (epoch + rounds) % EPOCHS


class SlotPlan(NamedTuple):
    """Where this rank's routes go; no shape here depends on the routing.

    Attributes:
        order_N: int64, routes by expert, the ones that go nowhere last.
        counts_E: int64, routes to each expert.
        slot_N: int64, slot of each route of `order_N` on its expert's rank; 0 for those that go nowhere.
        has_TW: bool, token t has a route to rank w.
        slot_TW: int64, its slot there.
    """

    order_N: Tensor
    counts_E: Tensor
    slot_N: Tensor
    has_TW: Tensor
    slot_TW: Tensor


def plan_slots(ids_TK: Tensor, num_experts: int, size: int) -> SlotPlan:
    """Expert ids (negative or >= num_experts: not routed) -> slots on each of `size` ranks."""
    num_tokens = ids_TK.shape[0]
    order_N, counts_E = sort_routes(ids_TK, num_experts)
    rank_TK = torch.where((ids_TK < 0) | (ids_TK >= num_experts), size, ids_TK // (num_experts // size))
    has_TW = torch.zeros(num_tokens, size + 1, dtype=torch.bool, device=ids_TK.device)
    has_TW = has_TW.scatter_(1, rank_TK, True)[:, :size]
    slot_TW = has_TW.cumsum(0) - 1
    # A column of zeros for the routes that go nowhere.
    slot_TK = torch.nn.functional.pad(slot_TW, (0, 1)).gather(1, rank_TK)
    return SlotPlan(order_N, counts_E, slot_TK.reshape(-1).index_select(0, order_N), has_TW, slot_TW)


def list_slots(plan: SlotPlan) -> tuple[Tensor, Tensor, Tensor]:
    """The slots that are sent, whose number depends on the routing.

    Returns:
        token_S: the token of each slot, by rank, then slot.
        home_S: places in that list, by token, then rank: in this order a token sums what its experts' ranks send back.
        home_ends_T: int64 [T + 1], where each token starts in `home_S`, and its length.
    """
    token_S = plan.has_TW.t().nonzero()[:, 1]
    slots_W = plan.has_TW.sum(0)
    home_S = (plan.slot_TW + (slots_W.cumsum(0) - slots_W))[plan.has_TW]
    return token_S, home_S, prefix_sums(plan.has_TW.sum(1))


def list_sums(slot_R: Tensor, choice_R: Tensor, num_slots: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Rows of each slot in increasing k, for the sum on the expert's rank.

    Args:
        slot_R: slot of each row, over all sources.
        choice_R: which of its token's K routes it is.

    Returns:
        Rows by slot, then k [R]; where each slot starts among them, and their number [num_slots + 1].
    """
    row_of = slot_R.new_full((num_slots * top_k,), -1)
    row_of[slot_R * top_k + choice_R] = torch.arange(slot_R.shape[0], device=slot_R.device)
    here = row_of >= 0
    return row_of[here], prefix_sums(here.view(num_slots, top_k).sum(1))


def prefix_sums(counts_N: Tensor) -> Tensor:
    """Counts [N] -> where each starts, and the total [N + 1]."""
    return torch.nn.functional.pad(counts_N.cumsum(0), (1, 0))
