"""Placement of experts: every expert has a slot, ranks are full and even, and the greedy choices are near the best."""

import itertools

import pytest
import torch

from moeweave.parallel.placement import invert, pack, place_experts, rank_loads, replicate


def loads(num_layers, num_experts, seed=0):
    """Zipf loads, shuffled anew in each layer."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1000 / (torch.arange(num_experts) + 1.0)
    return torch.stack([weights[torch.randperm(num_experts, generator=generator)] for _ in range(num_layers)])


def test_the_example_of_the_docstring():
    placement = place_experts(torch.tensor([[90, 30, 20, 10]]), 2, 6)
    assert placement.num_replicas.tolist() == [[3, 1, 1, 1]]
    assert sorted(rank_loads(torch.tensor([[90, 30, 20, 10]]), placement, 2)[0].tolist()) == [70, 80]


@pytest.mark.parametrize(
    "num_ranks, num_slots, num_groups, num_nodes",
    [(8, 64, 1, 1), (8, 80, 1, 1), (16, 96, 8, 4), (8, 72, 8, 2), (4, 64, 3, 2)],
)
def test_every_expert_has_its_slots(num_ranks, num_slots, num_groups, num_nodes):
    num_experts = 63 if num_groups == 3 else 64
    load_LE = loads(3, num_experts)
    found = place_experts(load_LE, num_ranks, num_slots, num_groups=num_groups, num_nodes=num_nodes)
    assert found.expert_of_slot.shape == (3, num_slots)
    for layer, expert in itertools.product(range(3), range(num_experts)):
        slots = [slot for slot in found.slots_of_expert[layer, expert].tolist() if slot >= 0]
        assert len(slots) == found.num_replicas[layer, expert] >= 1
        assert slots == sorted(slots)
        assert all(found.expert_of_slot[layer, slot] == expert for slot in slots)
    assert found.num_replicas.sum(1).tolist() == [num_slots] * 3
    assert torch.allclose(rank_loads(load_LE, found, num_ranks).sum(1), load_LE.double().sum(1))


def test_groups_stay_on_one_node():
    found = place_experts(loads(2, 64), 8, 80, num_groups=8, num_nodes=4)
    node_of_slot = torch.arange(80) // 20
    for layer in range(2):
        for group in range(8):
            nodes = node_of_slot[found.expert_of_slot[layer] // 8 == group]
            assert nodes.unique().numel() == 1


def test_replicas_even_out_what_packing_alone_cannot():
    load_LE = loads(4, 64)
    mean = load_LE.double().sum(1) / 8
    contiguous = rank_loads(load_LE, invert(torch.arange(64).expand(4, -1), 64), 8).amax(1) / mean
    packed = rank_loads(load_LE, place_experts(load_LE, 8), 8).amax(1) / mean
    replicated = rank_loads(load_LE, place_experts(load_LE, 8, 80), 8).amax(1) / mean
    # One expert alone carries 1.7 times a rank's mean: no packing can go below that.
    assert (packed <= contiguous).all() and (packed > 1.6).all()
    assert (replicated < 1.05).all()


def test_greedy_packing_is_near_the_best_of_all():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        weights = torch.randint(1, 100, (8,), generator=generator).tolist()
        best = min(
            max(sum(weights[i] for i in half), sum(weights) - sum(weights[i] for i in half))
            for half in itertools.combinations(range(8), 4)
        )
        bins = pack(weights, 2)
        assert sorted(bins[0] + bins[1]) == list(range(8)) and len(bins[0]) == 4
        assert max(sum(weights[i] for i in members) for members in bins) <= 4 / 3 * best  # Graham's bound for greedy


def test_spare_slots_go_to_the_most_loaded():
    assert replicate([90, 30, 20, 10], 6) == [3, 1, 1, 1]
    assert replicate([0, 0], 4) == [3, 1]
    assert replicate([5, 5, 5], 3) == [1, 1, 1]


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((4, 62), {}, r"num_slots \(62\) must be a multiple of num_ranks \(4\)"),
        ((5,), {}, r"Use 65, or more for replicas"),
        ((4, 64), {"num_groups": 5}, r"num_groups \(5\) must divide the experts \(64\). It can be 1, 2, 4"),
        ((4, 64), {"num_nodes": 3}, r"num_nodes \(3\) must divide the ranks \(4\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        place_experts(loads(1, 64), *arguments, **options)


def test_nan_loads_are_refused():
    with pytest.raises(ValueError, match="not NaN"):
        place_experts(torch.full((1, 4), torch.nan), 2)
