"""Slots of a one-sided dispatch: the worked example, and random routings against a loop over tokens.

Letters: T tokens, K routes a token, W ranks, S slots, R rows.
"""

from __future__ import annotations

import pytest
import torch

from moeweave.comm.slots import EPOCHS, later_epoch, list_slots, list_sums, plan_slots


def test_worked_example() -> None:
    plan = plan_slots(torch.tensor([[3, 0], [0, 1], [2, -1]]), 4, 2)
    assert plan.order_N.tolist() == [1, 2, 3, 4, 0, 5]
    assert plan.counts_E.tolist() == [2, 1, 1, 1]
    assert plan.slot_N.tolist()[:5] == [0, 1, 1, 1, 0]
    assert plan.has_TW.tolist() == [[True, True], [True, False], [False, True]]
    token_S, home_S, home_ends_T = list_slots(plan)
    assert token_S.tolist() == [0, 1, 0, 2]
    assert (home_S.tolist(), home_ends_T.tolist()) == ([0, 2, 1, 3], [0, 2, 3, 4])


@pytest.mark.parametrize("num_tokens, top_k, size", [(0, 2, 2), (1, 1, 4), (63, 8, 4), (64, 16, 8), (17, 3, 1)])
def test_equals_a_loop_over_tokens(num_tokens: int, top_k: int, size: int) -> None:
    num_experts = 16
    ids_TK = torch.randint(-3, num_experts + 2, (num_tokens, top_k))
    plan = plan_slots(ids_TK, num_experts, size)
    token_S, home_S, home_ends_T = list_slots(plan)
    slots: list[list[int]] = [[] for _ in range(size)]
    for token, ids in enumerate(ids_TK.tolist()):
        for rank in sorted({expert * size // num_experts for expert in ids if 0 <= expert < num_experts}):
            slots[rank].append(token)
    assert token_S.tolist() == [token for rank in slots for token in rank]
    for token in range(num_tokens):
        places = home_S[home_ends_T[token] : home_ends_T[token + 1]].tolist()
        assert places == sorted(places), "increasing ranks"
        assert [token_S[place] for place in places] == [token] * len(places)
    flat = ids_TK.reshape(-1).tolist()
    for route, slot in zip(plan.order_N.tolist(), plan.slot_N.tolist(), strict=True):
        if 0 <= flat[route] < num_experts:
            assert slots[flat[route] * size // num_experts][slot] == route // top_k


def test_sums_take_their_rows_in_increasing_k() -> None:
    # Rows 0..4: slots 1, 0, 1, 1, 3 as routes k = 2, 0, 0, 1, 1 of their tokens.
    terms, ends = list_sums(torch.tensor([1, 0, 1, 1, 3]), torch.tensor([2, 0, 0, 1, 1]), 4, 3)
    assert (terms.tolist(), ends.tolist()) == ([1, 2, 3, 0, 4], [0, 1, 4, 4, 5])


def test_epochs_go_round() -> None:
    assert later_epoch(EPOCHS - 1) == 0
    assert later_epoch(0, -2) == EPOCHS - 2
