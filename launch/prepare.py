"""What a config is checked for before any rank starts, and what a rank builds from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeweave.comm.topology import Topology
from moeweave.launch import data, env
from moeweave.launch.schema import ConfigError, DataConfig, MeshConfig, ModelConfig
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.data_deepspeed_config import check_accumulation, check_zero
from moeweave.parallel.expert import check_codec_width
from moeweave.parallel.expert_width import check_width
from moeweave.parallel.hf.build import build_model
from moeweave.parallel.placed import place_blocks
from moeweave.parallel.plan import Plan
from moeweave.parallel.replicas import check_replicas
from moeweave.parallel.schedules import Layout
from moeweave.parallel.sequence import check_sequence, shares_sequence
from moeweave.parallel.stages import layer_list, share_out
from moeweave.parallel.tensor import plan_of


def check_model(model: ModelConfig, mesh: MeshConfig, plan: dict[str, Any]) -> nn.Module:
    """The model on the meta device, once plan, architecture and mesh are known to fit. Raises ValueError."""
    parsed = Plan.from_dict(plan)
    _check_topology(plan.get("topology"))
    if model.weights and not Path(model.source).expanduser().is_dir():
        raise ConfigError(
            f"model.weights=true: model.source={model.source} is no folder to read them from. Name one that holds "
            "config.json and safetensors, or set model.weights=false."
        )
    built = build_model(model.source, model.overrides, size=model.size, device="meta")
    check_zero(built, Plan.from_dict(plan), mesh.sizes())
    blocks = find_moe_blocks(built)
    if mesh.ep > 1 and not blocks:
        raise ConfigError(f"mesh.ep={mesh.ep}: {type(built).__name__} has no experts to share out. Set mesh.ep=1.")
    sizes = mesh.sizes()
    for block in place_blocks(blocks, parsed.placement, sizes):
        sizes.check_experts(block.num_slots, block.path)
        check_codec_width(block, parsed)
        check_replicas(block, sizes, parsed)
        if sizes.etp > 1:
            check_width(block, sizes.etp, sizes.edp)
    if sizes.tp > 1:
        plan_of(built, blocks, sizes.tp)
    if shares_sequence(sizes, parsed):
        check_sequence(built, blocks, sizes, parsed)
    if sizes.pp > 1:
        share_out([0] * len(layer_list(built, blocks)), Layout(parsed.schedule, sizes.pp).num_stages, 0, 0)
    return built


def _check_topology(path: str | None) -> None:
    ranks = env.launched_ranks()
    if path is not None and (ranks is None or ranks.rank == 0):  # other hosts need not have the file
        Topology.load(path)


def check_microbatches(count: int, mesh: MeshConfig, plan: dict[str, Any]) -> None:
    """Raises ValueError when the pipeline's schedule, or the user's ds_config, cannot run that many micro-batches."""
    check_accumulation(Plan.from_dict(plan), count)
    if mesh.pp > 1:
        Layout(Plan.from_dict(plan).schedule, mesh.pp).check_microbatches(count)


def check_data(config: DataConfig, model: nn.Module) -> None:
    """Raises ConfigError when the data is missing, too short, or has ids that the model lacks."""
    data.check(data.open_tokens(config), vocab_size(model), config.seq_length)


def model_builder(config: ModelConfig, seed: int) -> Callable[[], nn.Module]:
    """A function that builds the model with the same random weights at every call, on every rank."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_model(config.source, config.overrides, size=config.size)

    return build


def vocab_size(model: nn.Module) -> int | None:
    """How many token ids the model has embeddings for, where it says so."""
    get = getattr(model, "get_input_embeddings", None)
    embeddings = get() if callable(get) else None
    return getattr(embeddings, "num_embeddings", None)


def describe(model: nn.Module) -> str:
    """Qwen3MoeForCausalLM, 12.3 M parameters, 4 MoE layers of 8 experts"""
    count = sum(parameter.numel() for parameter in model.parameters())
    experts = [block.num_experts for block in find_moe_blocks(model)]
    kinds = "/".join(str(num) for num in sorted(set(experts)))
    moe = f"{len(experts)} MoE layers of {kinds} experts" if experts else "no experts"
    name = type(model).__name__.removeprefix("FSDP")  # FSDP2 makes a class of its own of each
    return f"{name}, {count / 1e6:.1f} M parameters, {moe}"
