"""`parallelize(model, mesh, plan)`: the one verb that spreads a model over ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moeweave.comm.topology import Topology
from moeweave.moe.layer import MoELayer
from moeweave.parallel.adapter import MoEBlock, UnsupportedModel, find_moe_blocks
from moeweave.parallel.data import apply_data_parallel, repeated_blocks, splits_tokens
from moeweave.parallel.data_deepspeed_config import check_zero
from moeweave.parallel.evaluation import install_evaluation
from moeweave.parallel.expert import ExpertCall, check_codec_width, install_expert_call, shard_experts
from moeweave.parallel.expert_width import check_width
from moeweave.parallel.generate import install_lockstep
from moeweave.parallel.hf.capture import keep_recording
from moeweave.parallel.hf.lora import base_model, call_with_hooks, install_deltas
from moeweave.parallel.loss import install_loss_hooks
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.microbatch import refuse_lanes
from moeweave.parallel.no_ddp import refuse_ddp
from moeweave.parallel.pipeline import Pipeline
from moeweave.parallel.placed import place_blocks
from moeweave.parallel.plan import Plan
from moeweave.parallel.prefill import install_prefill
from moeweave.parallel.recompute import apply_recompute
from moeweave.parallel.record import Record
from moeweave.parallel.replicas import check_replicas
from moeweave.parallel.same_weights import check_same_weights
from moeweave.parallel.schedules import Layout
from moeweave.parallel.sequence import SequenceSharing, install_sequence, shares_sequence
from moeweave.parallel.stages import Cut, cut_model
from moeweave.parallel.tensor import apply_tensor_parallel, plan_of
from moeweave.parallel.three_stream import PlanesOfModel, install_three_stream, refuse_three_stream

logger = logging.getLogger("moeweave")


def parallelize(model: nn.Module, mesh: Mesh, plan: Plan | None = None) -> nn.Module:
    """Spread `model` over the ranks of `mesh`, in place.

    Numbered as they happen:
        1. find the MoE blocks, by structure; refuse models that cannot be wrapped, by name and with the reason
        2. split attention, MLPs, embeddings and head over `tp`, share sequences over `sp`, if there are such axes
        3. keep this rank's experts (DTensors over `ep`, `etp`); dispatch, experts, combine, as `Plan.overlap`
           schedules them, replace the experts' call
        4. checkpoint activations if the plan says so
        5. shard or replicate the rest over the data ranks
        6. make `model(**batch).loss` the rank's share of the global loss

    Parameter names stay; router, block, shared experts and classes stay. Parameters on the meta device stay there, to
    be filled by `mw.load`; others move to the mesh's device. All ranks must pass the same weights: they are not
    broadcast, and a sample of them is compared.

    Args:
        model: a Hugging Face model (transformers >= 5.0) or any nn.Module whose experts follow the call
            `experts(hidden, ids, weights)`, or were introduced by `register_moe`.
        mesh: which ranks do what.
        plan: policy; the default is FSDP2 with automatic dispatch.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model is wrapped already, cannot be wrapped, or does not fit the mesh; ranks passed different
            weights. Raised on every rank.
    """
    plan = plan or Plan()
    blocks = _find_and_check(model, mesh, plan)
    check_same_weights(model, mesh)
    num_experts = blocks[0].num_experts if blocks else 0
    top_k = top_k_of(model)
    sharing = SequenceSharing(model, blocks, mesh, plan) if shares_sequence(mesh.sizes, plan) else None
    layout = Layout(plan.schedule, mesh.sizes.pp)
    cut = _cut(model, blocks, mesh, plan, layout) if mesh.sizes.pp > 1 else None
    if cut is not None:
        blocks = find_moe_blocks(model)
    blocks = place_blocks(blocks, plan.placement, mesh.sizes)
    if not any(param.is_meta for param in model.parameters()):
        model.to(mesh.device)

    if mesh.sizes.tp > 1:
        shards = sharing.layers if sharing is not None and plan.tp_sequence else None
        apply_tensor_parallel(model, blocks, mesh.dense["tp"], shards)
    calls = _wrap_blocks(model, blocks, mesh, plan)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    record = Record(mesh, plan, blocks, calls, layers, top_k, _aux_coef(model))
    # peft calls the model it wraps past that model's hooks, and generates with it: everything goes onto the inner one.
    core = base_model(model)
    if sharing is not None:
        record.sequence = sharing
        routers = [model.get_submodule(block.router_path) for block in blocks if block.router_path is not None]
        install_sequence(core, routers, sharing, record)
    if plan.recompute:
        homes = [model.get_submodule(block.block_path) for block in blocks]
        apply_recompute(core, repeated_blocks(core, blocks) or homes)
    apply_data_parallel(core, blocks, mesh, plan, record.grad_sync)
    install_loss_hooks(core, record)
    install_prefill(core, record)
    install_lockstep(core, record)
    install_evaluation(core, record)
    keep_recording(core)
    if cut is not None:
        record.pipeline = Pipeline(core, cut, layout, record, num_experts)
    if core is not model:
        call_with_hooks(core)
        vars(core)["_moeweave"] = record
    vars(model)["_moeweave"] = record
    refuse_ddp(model)
    return model


def _find_and_check(model: nn.Module, mesh: Mesh, plan: Plan) -> list[MoEBlock]:
    """The model's MoE blocks, once all has been refused that mesh or plan cannot do with it."""
    _refuse_wrapped(model)
    _refuse_with_zero(model, mesh, plan)
    _refuse_placed(model, plan)
    blocks = find_moe_blocks(model)
    if mesh.sizes.ep > 1 and not blocks:
        raise ValueError(f"ep ({mesh.sizes.ep}) needs experts, and {type(model).__name__} has none. Set ep=1.")
    for block in place_blocks(blocks, plan.placement, mesh.sizes):
        mesh.sizes.check_experts(block.num_slots, block.path)
        check_codec_width(block, plan)
        check_replicas(block, mesh.sizes, plan)
    _refuse_with_tp(model, blocks, mesh, plan)
    _refuse_with_etp(model, blocks, mesh)
    _refuse_with_sequence(mesh, plan)
    refuse_three_stream(mesh, plan)
    refuse_lanes(base_model(model), plan)
    _refuse_split_ties(model, blocks, mesh, plan)
    return blocks


def _refuse_wrapped(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} is what torch.compile returned. Wrap the model itself, and compile it afterwards, "
            "in place, by model.compile()."
        )
    for path, module in model.named_modules():
        parts = vars(module)
        if "_moeweave" in parts or isinstance(module, FSDPModule) or isinstance(parts.get("forward"), ExpertCall):
            raise ValueError(
                f"{path or 'the model'} ({type(module).__name__}) is wrapped already. Build the model anew, and wrap "
                "it once and as a whole."
            )


def _cut(model: nn.Module, blocks: list[MoEBlock], mesh: Mesh, plan: Plan, layout: Layout) -> Cut:
    if base_model(model) is not model:
        raise ValueError("pp does not cut models that peft wraps. Set pp=1, or merge_and_unload() the adapters.")
    if mesh.loss_size > 1 and plan.data == "ddp":
        raise ValueError(f"Plan.data ('ddp') does not run under pp ({mesh.sizes.pp}). Use Plan(data='fsdp2').")
    if plan.grad_sync != "last":
        raise ValueError(f"Plan.grad_sync ({plan.grad_sync!r}) must be 'last' under pp ({mesh.sizes.pp}), or set pp=1.")
    if plan.aux != "global":
        raise ValueError(f"Plan.aux ({plan.aux!r}) must be 'global' under pp ({mesh.sizes.pp}), or set pp=1.")
    if not hasattr(model, "base_model_prefix") and not getattr(model, "chained_layers", False):
        raise UnsupportedModel(
            f"pp hands the output of one layer to the next, and cannot see whether {type(model).__name__}.forward does "
            "no more than that between its layers (a residual outside of them would be lost). If it does no more, set "
            "`chained_layers = True` on the model; else move the residual into the layer, or set pp=1."
        )
    if not hasattr(model, "config"):
        width = next((m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)), None)
        if width is None:
            raise UnsupportedModel(f"{type(model).__name__} has no nn.Embedding to tell its width by. Set pp=1.")
        vars(model)["_moeweave_width"] = width
    return cut_model(model, blocks, layout, mesh.dense.get_local_rank("pp"), top_k_of(model))


def _refuse_split_ties(model: nn.Module, blocks: list[MoEBlock], mesh: Mesh, plan: Plan) -> None:
    """One weight in two units that are sharded apart would become two, without a word."""
    apart = [block.experts for block in blocks] if splits_tokens(mesh) else []
    if plan.data == "fsdp2" and mesh.loss_size > 1:
        apart = repeated_blocks(model, blocks) + apart
    unit_of = {id(module): index for index, unit in enumerate(apart) for module in unit.modules()}
    home: dict[int, tuple[str, int]] = {}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            here = (f"{path}.{name}", unit_of.get(id(module), -1))
            first = home.setdefault(id(param), here)
            if first[1] != here[1]:
                raise UnsupportedModel(
                    f"{first[0]} and {here[0]} are one weight in parts of {type(model).__name__} that are sharded "
                    "apart; they would drift. Use Plan(data='ddp') with ep=1, or untie them."
                )


def _refuse_with_tp(model: nn.Module, blocks: list[MoEBlock], mesh: Mesh, plan: Plan) -> None:
    tp = mesh.sizes.tp
    if tp > 1:
        plan_of(model, blocks, tp)  # of the whole model, so that stages refuse alike
    if tp > 1 and plan.data == "ddp":
        raise ValueError(f"tp ({tp}) needs Plan(data='fsdp2'): DDP cannot hold split parameters.")
    if tp > 1 and base_model(model) is not model:
        raise ValueError(
            f"tp ({tp}) must be 1 for a model with adapters ({type(model).__name__}): they are not split. Set tp=1, or "
            "merge_and_unload() the adapters."
        )


def _refuse_with_sequence(mesh: Mesh, plan: Plan) -> None:
    if shares_sequence(mesh.sizes, plan) and plan.aux != "global":
        raise ValueError(
            f"Plan.aux ({plan.aux!r}) must be 'global' where ranks share sequences: sp ({mesh.sizes.sp}), tp_sequence "
            f"({plan.tp_sequence})."
        )


def _refuse_with_zero(model: nn.Module, mesh: Mesh, plan: Plan) -> None:
    check_zero(model, plan, mesh.sizes)
    if plan.zero_stage is not None and base_model(model) is not model:
        raise ValueError(f"Plan.data ({plan.data!r}) takes no adapters ({type(model).__name__}). Use data='fsdp2'.")


def _refuse_placed(model: nn.Module, plan: Plan) -> None:
    if plan.placement is not None and base_model(model) is not model:
        raise ValueError(
            f"Plan.placement takes no adapters ({type(model).__name__}): they are cut by experts. Set placement=None."
        )


def _refuse_with_etp(model: nn.Module, blocks: list[MoEBlock], mesh: Mesh) -> None:
    etp = mesh.sizes.etp
    if etp == 1:
        return
    if not blocks:
        raise ValueError(f"etp ({etp}) needs experts, and {type(model).__name__} has none. Set etp=1.")
    if base_model(model) is not model:
        raise ValueError(
            f"etp ({etp}) must be 1 for a model with adapters ({type(model).__name__}): they are not split. Set etp=1, "
            "or merge_and_unload() the adapters."
        )
    for block in blocks:
        check_width(block, etp, mesh.sizes.edp)


def _wrap_blocks(model: nn.Module, blocks: list[MoEBlock], mesh: Mesh, plan: Plan) -> list[ExpertCall]:
    return_group = mesh.new_group("ep") if plan.overlap == "microbatch" and blocks else None
    # The first rank's file for all: expert groups choose alike, wherever they are.
    topology = None if plan.topology is None else Topology.shared(plan.topology, dist.group.WORLD)
    calls = [_wrap_block(model, block, mesh, plan, return_group, topology) for block in blocks]
    if plan.overlap == "three_stream" and blocks:
        planes = PlanesOfModel(mesh, topology=topology)
        for block, call in zip(blocks, calls, strict=True):
            install_three_stream(model, block, call, planes.schedule(block.num_slots, top_k_of(model), plan))
    return calls


def _wrap_block(
    model: nn.Module,
    block: MoEBlock,
    mesh: Mesh,
    plan: Plan,
    return_group: dist.ProcessGroup | None,
    topology: Topology | None,
) -> ExpertCall:
    shard_experts(block, mesh)
    if plan.zero_stage is not None:
        plan = replace(plan, dtype=None)  # DeepSpeed converts the parameters themselves.
    parent = model.get_submodule(block.block_path)
    call = install_expert_call(block, top_k_of(model), mesh, plan, parent, return_group, topology)
    install_deltas(model, block, call)
    return call


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def top_k_of(model: nn.Module) -> int:
    """Routes a token, as model or config say it; decides `auto` dispatch and the balance loss."""
    names = ("num_experts_per_tok", "moe_topk", "top_k", "num_experts_per_token")
    found = [getattr(model, names[0], None), *(getattr(_config(model), name, None) for name in names)]
    found += [getattr(module, "top_k", None) for module in model.modules()]
    return next((value for value in found if isinstance(value, int)), 1)


def _aux_coef(model: nn.Module) -> float:
    for owner in (model, _config(model)):
        value = getattr(owner, "router_aux_loss_coef", None)
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0
