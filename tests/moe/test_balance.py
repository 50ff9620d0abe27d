"""Balance losses, their global form, the bias update and capacity, against plain loops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeweave.kernels_ext.tolerance import assert_close
from moeweave.moe.balance import apply_capacity, aux_loss, bias_update, load, z_loss

E, K = 5, 2


def make(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Logits (float64) and the ids of their K largest, some not routed."""
    logits = torch.randn(num_tokens, E, dtype=torch.float64)
    ids = logits.topk(K).indices
    ids[::4, 1] = -1
    return logits, ids


def test_load_counts_what_is_routed_and_not_masked() -> None:
    ids = torch.tensor([[0, 1], [1, -1], [5, 1]])
    assert load(ids, 5).tolist() == [1, 3, 0, 0, 0]
    assert load(ids, 5, torch.tensor([True, False, True])).tolist() == [1, 2, 0, 0, 0]
    assert load(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_aux_loss_of_two_tokens() -> None:
    probs, ids = torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([[0], [0]])
    assert aux_loss(probs, ids).item() == pytest.approx(1.4)


def test_aux_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed() -> None:
    uniform, ids = torch.full((6, 3), 1 / 3), torch.arange(6).view(6, 1) % 3
    assert aux_loss(uniform, ids).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0.0, 0.0]]).expand(6, 3)
    assert aux_loss(collapsed, torch.zeros(6, 1, dtype=torch.int64)).item() == pytest.approx(3.0)


def test_aux_loss_is_that_of_transformers_over_top_k() -> None:
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(12, E)
    mask = torch.ones(3, 4)
    mask[1, 2:] = 0
    ids = logits.softmax(-1).topk(K).indices
    theirs = module.load_balancing_loss_func((logits,), E, K, mask)
    assert_close("aux", K * aux_loss(logits.softmax(-1), ids, mask.view(-1).bool()), theirs)


def test_z_loss_is_the_mean_square_of_log_sum_exp() -> None:
    assert z_loss(torch.zeros(3, 2)).item() == pytest.approx(0.4804530)
    logits = torch.randn(6, E)
    mask = torch.tensor([True, True, False, True, False, True])
    assert_close("z", z_loss(logits, mask), torch.logsumexp(logits[mask], 1).square().mean())


def test_no_token_gives_no_loss_and_zero_gradients() -> None:
    logits = torch.empty(0, E, requires_grad=True)
    loss = aux_loss(logits.softmax(-1), torch.empty(0, K, dtype=torch.int64)) + z_loss(logits)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, E)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_over_ranks_are_those_of_the_whole_batch(masked: bool) -> None:
    """Uneven ranks, one without tokens: each rank's value is the global one, and so is the mean of the gradients."""
    logits, ids = make(20)
    logits.requires_grad_()
    mask = torch.rand(20) > 0.3 if masked else None
    parts = [slice(0, 11), slice(11, 11), slice(11, 20)]

    def losses(part: slice, reduce) -> tuple[Tensor, Tensor]:
        mask_T = None if mask is None else mask[part]
        return (
            aux_loss(logits[part].softmax(-1), ids[part], mask_T, reduce=reduce),
            z_loss(logits[part], mask_T, reduce=reduce),
        )

    # What the ranks hand to the all-reduce, summed; the two losses hand vectors of different lengths.
    sums: dict[int, Tensor] = {}

    def hand(x: Tensor) -> Tensor:
        sums[x.shape[0]] = sums.get(x.shape[0], 0) + x
        return x

    for part in parts:
        losses(part, hand)
    on_ranks = [losses(part, lambda x: sums[x.shape[0]]) for part in parts]
    for index, want in enumerate(losses(slice(0, 20), None)):
        got = [pair[index] for pair in on_ranks]
        want_grad = torch.autograd.grad(want, logits, retain_graph=True)[0]
        mean_grad = sum(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in got) / len(parts)
        for loss in got:
            assert_close("value", loss, want)
        assert_close("gradient", mean_grad, want_grad)


def test_bias_update_raises_the_underloaded() -> None:
    assert_close("delta", bias_update(torch.tensor([5, 1, 3]), 0.1), torch.tensor([-0.1, 0.1, 0.0]))
    huge = torch.tensor([2**40, 2**40 + 1, 2**40 - 1])  # beyond float32
    assert bias_update(huge, 1.0).tolist() == [0.0, -1.0, 1.0]


@pytest.mark.parametrize("by, kept", [("position", [0, 0, -1]), ("probability", [-1, 0, 0])])
def test_capacity_of_two(by: str, kept: list[int]) -> None:
    ids, weights = torch.tensor([[0], [0], [0]]), torch.tensor([[0.2], [0.9], [0.5]])
    got_ids, got_weights, dropped = apply_capacity(ids, weights, 2, by)
    assert got_ids.view(-1).tolist() == kept
    assert torch.equal(got_weights, torch.where(got_ids < 0, 0.0, weights))
    assert dropped.item() == 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=2, max_size=2), max_size=15),
    st.integers(0, 5),
    st.sampled_from(["position", "probability"]),
)
def test_capacity_equals_a_loop(ids: list[list[int]], capacity: int, by: str) -> None:
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    torch.manual_seed(capacity)
    weights_TK = torch.randint(1, 4, ids_TK.shape).float().requires_grad_()  # few values: ties matter
    got_ids, got_weights, dropped = apply_capacity(ids_TK, weights_TK, capacity, by)

    flat, weights = ids_TK.view(-1).tolist(), weights_TK.detach().view(-1).tolist()
    order = range(len(flat)) if by == "position" else sorted(range(len(flat)), key=lambda route: -weights[route])
    taken: Counter[int] = Counter()
    want = [-1] * len(flat)
    for route in order:
        if flat[route] >= 0 and taken[flat[route]] < capacity:
            taken[flat[route]] += 1
            want[route] = flat[route]
    assert got_ids.view(-1).tolist() == want
    assert dropped.item() == sum(expert >= 0 for expert in flat) - sum(taken.values())
    assert torch.equal(got_weights, weights_TK.masked_fill((got_ids < 0) & (ids_TK >= 0), 0.0))
    got_weights.sum().backward()
    assert torch.equal(weights_TK.grad, ((got_ids >= 0) | (ids_TK < 0)).float())


def test_what_does_not_fit_is_refused() -> None:
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"by \('random'\) must be 'position' or 'probability'"):
        apply_capacity(ids, weights, 1, "random")
    with pytest.raises(ValueError, match=r"capacity_per_expert \(-1\) must not be negative"):
        apply_capacity(ids, weights, -1, "position")
