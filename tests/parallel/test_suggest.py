"""Suggested meshes: they fit what was asked, they can be built, and their numbers are those of the model."""

import dataclasses

import pytest
import torch

import moeweave as mw
from moeweave.comm.cost import remote_ranks
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.footprint import footprint
from moeweave.parallel.hf.build import build_model
from moeweave.parallel.parallelize import top_k_of
from run_ranks import run_ranks

GIB = 2**30


def suggest(model_type, world, memory=80 * GIB, tokens=2**20, **options):
    model = build_model(model_type, options.pop("overrides", {}), size="given", device="meta", dtype=torch.bfloat16)
    return mw.suggest(model, world, memory, tokens, **options)


def test_suggestions_use_all_ranks_fit_and_come_fastest_first():
    found = suggest("mixtral", 16)
    assert all(each.sizes.world == 16 and each.states < each.memory <= 80 * GIB for each in found)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert len({each.sizes for each in found}) == len(found) > 1


def test_tp_stays_inside_a_host_and_stages_wait():
    found = suggest("deepseek_v3", 64, memory=200 * GIB, hardware=mw.Hardware(ranks_per_node=4), limit=1000)
    assert max(each.sizes.tp for each in found) <= 4
    for each in found:
        pp = each.sizes.pp
        assert each.bubble == pytest.approx((pp - 1) / (each.microbatches + pp - 1))
        assert ("pp" in each.sent) == (pp > 1)
        assert ("ep" in each.sent) == (each.sizes.ep > 1)


def test_long_sequences_are_not_refused_for_short_batches():
    with pytest.raises(ValueError, match=r"tokens \(1024\) must be at least one sequence \(4096\)"):
        suggest("mixtral", 8, tokens=1024)
    with pytest.raises(ValueError, match="no mesh of so many ranks can hold"):
        suggest("mixtral", 512, tokens=4096)


def test_too_little_memory_names_the_leanest_mesh():
    with pytest.raises(ValueError, match=r"memory_per_rank \(10.0 GiB\) is too little on 8 ranks: the leanest mesh"):
        suggest("mixtral", 8, memory=10 * GIB)


@pytest.mark.transformers("5.1", "5.0 leaves the tied weights of a model on meta untied")
def test_a_tied_head_is_counted_once_a_stage_that_has_it():
    model = build_model("mixtral", {"tie_word_embeddings": True}, size="given", device="meta")
    found = footprint(model, find_moe_blocks(model), top_k_of(model))
    held = [sum(unit.split + unit.whole + unit.experts for unit in stage) for stage in found.stages(2)]
    table = model.get_input_embeddings().weight.numel()
    assert len(found.stages(1)[0]) == len(found.layers) + 2
    assert sum(held) == sum(param.numel() for param in model.parameters()) + table


@pytest.mark.parametrize("num_experts, top_k, ep", [(256, 8, 4), (8, 2, 4), (64, 6, 8), (16, 16, 4), (4, 1, 4)])
def test_remote_ranks_are_those_of_random_routing(num_experts, top_k, ep):
    ids = torch.rand(20_000, num_experts, generator=torch.Generator().manual_seed(0)).topk(top_k, dim=1).indices
    owners = ids // (num_experts // ep)
    seen = sum((owners == rank).any(1).float().mean().item() for rank in range(1, ep))
    assert remote_ranks(num_experts, top_k, ep) == pytest.approx(seen, abs=0.03)


def test_what_a_token_saves_is_near_what_autograd_keeps():
    model = build_model("mixtral", dict(hidden_size=128, intermediate_size=256, vocab_size=512), size="tiny")
    blocks = find_moe_blocks(model)
    found = footprint(model, blocks, top_k_of(model))
    params = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(512, (1, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model(input_ids=ids).last_hidden_state
    assert out.requires_grad
    numbers = sum(unit.saved + unit.saved_experts for unit in found.layers) * ids.numel()
    assert 0.5 < sum(kept.values()) / 4 / numbers < 2


def step_on(mesh_sizes, plan_fields):
    torch.manual_seed(0)
    mesh = mw.Mesh(**mesh_sizes, device="cpu")
    model = mw.parallelize(build_model("mixtral", size="tiny"), mesh, mw.Plan(**plan_fields))
    ids = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(mesh.data_rank))
    return float(mw.forward_backward(model, {"input_ids": ids, "labels": ids}, microbatches=4))


@pytest.mark.ranks(4)
def test_a_suggested_mesh_trains():
    model = build_model("mixtral", size="tiny", device="meta")
    found = mw.suggest(model, 4, GIB, 4096, sequence=16, hardware=mw.Hardware(ranks_per_node=2), limit=100)
    chosen = next(each for each in found if each.sizes.pp == 2 and each.sizes.ep == 2)
    losses = run_ranks(4, step_on, chosen.mesh, dataclasses.asdict(chosen.plan))
    assert all(loss == pytest.approx(losses[0]) and 4 < loss < 8 for loss in losses)
