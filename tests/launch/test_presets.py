"""Presets of published models: their sizes are the published ones, and their meshes fit the experts and the memory."""

from __future__ import annotations

import functools
import re

import pytest

import moeweave as mw
from moeweave.launch import compose, prepare, report, submit
from moeweave.launch.schema import TrainConfig
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.footprint import footprint
from moeweave.parallel.parallelize import top_k_of
from moeweave.parallel.plan import Plan
from moeweave.parallel.suggest import estimate

# Billions of parameters, all and those of one token (embeddings counted), from the models' cards and reports.
PUBLISHED = {
    "mixtral_8x7b": (46.7, 12.9),
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen3_235b_a22b": (235.0, 22.0),
    "deepseek_v3": (671.0, 37.0),
    "gpt_oss_120b": (116.8, 5.7),
}
CHOICES = {
    path.stem: re.search(r"override /model: (\w+)", path.read_text())[1]
    for path in sorted((compose.CONFIGS / "experiment").glob("*.yaml"))
}
PRESETS = [name for name, model in CHOICES.items() if model in PUBLISHED]
GPU_BYTES = 72 * 2**30  # what is left of 80 GB beside contexts and fragments
NPU_BYTES = 57 * 2**30  # and of 64


def load(*overrides: str) -> TrainConfig:
    return compose.load(TrainConfig, "train", overrides)


@functools.cache
def model_of(name: str):
    config = load(f"model={name}")
    return prepare.check_model(config.model, config.mesh, config.plan)


def test_every_published_model_has_presets_between_8_and_256_gpus():
    gpus = {name: int(name.rpartition("_")[2]) for name in PRESETS}
    assert {CHOICES[name] for name in PRESETS} == set(PUBLISHED)
    assert (min(gpus.values()), max(gpus.values())) == (8, 256)
    for name, count in gpus.items():
        assert load(f"experiment={name}").mesh.sizes().world == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_were_published(name):
    model = model_of(name)
    count = report.count(model, find_moe_blocks(model))
    everything, active = PUBLISHED[name]
    assert (count.experts + count.dense) / 1e9 == pytest.approx(everything, rel=0.003)
    assert (count.experts_active + count.dense) / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_mesh_fits_its_experts_and_its_memory(name):
    """By the estimate of mw.suggest, with the activations and the gathered layers of one micro-batch."""
    config, model = load(f"experiment={name}"), model_of(CHOICES[name])
    blocks, sizes, plan = find_moe_blocks(model), config.mesh.sizes(), Plan.from_dict(config.plan)
    for block in blocks:
        sizes.check_experts(block.num_experts, block.path)
    assert config.batch_size == config.microbatches * config.mesh.data_size  # a micro-batch is one sequence
    found = footprint(model, blocks, top_k_of(model), sizes.tp)
    cost = estimate(found, sizes, plan, config.microbatches, config.data.seq_length, mw.Hardware())
    assert cost.states < cost.memory < (NPU_BYTES if config.mesh.device == "npu" else GPU_BYTES)
    prepare.check_data(config.data, model)


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_sets_is_in_the_resolved_config(name):
    config = load(f"experiment={name}", "steps=7")
    assert (config.steps, config.name, config.plan["dtype"], config.proof) == (7, name, "bfloat16", False)
    assert config.model.overrides["num_hidden_layers"] > 30


@pytest.mark.parametrize("node, ranks, nodes", [("a2", 8, 2), ("a3", 16, 1)])
@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_atlas_nodes_are_asked_for_by_their_devices(kind, node, ranks, nodes, tmp_path, capsys):
    arguments = [f"experiment=qwen3_30b_{node}_16", f"launcher={kind}_{node}", "show=true"]
    where = [f"run.root={tmp_path}"] + (["container=ascend"] if kind == "kubernetes" else [])
    assert submit.main([*arguments, *where]) == 0
    shown = capsys.readouterr().out
    asked = f"--gres=npu:{ranks}" if kind == "slurm" else "huawei.com/Ascend910"
    assert asked in shown and "--gpus-per-node" not in shown and "nvidia.com" not in shown
    assert (f"--nodes={nodes}" if kind == "slurm" else f"numNodes: {nodes}") in shown
    assert "HCCL_BUFFSIZE" in shown
