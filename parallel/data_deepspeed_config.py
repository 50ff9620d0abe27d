"""What `Plan(data="zero0".."zero3")` asks of model, mesh and the user's DeepSpeed config. Imports no deepspeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.plan import Plan

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Sections of a DeepSpeed config that say what plan, mesh or optimizer say already, or what would make gradients or
# their norm wrong here. One that is empty or switched off counts as absent.
_REFUSED: dict[str, str] = {
    "optimizer": "the optimizer is the one given to mw.prepare_optimizer",
    "scheduler": "build the scheduler over the optimizer that mw.prepare_optimizer returns",
    "tensor_parallel": "tensor parallelism is Mesh(tp=)",
    "expert_parallel": "expert parallelism is Mesh(ep=)",
    "sequence_parallel_size": "sequence parallelism is not DeepSpeed's here",
    "data_parallel_size": "the data ranks are Mesh(dp=)",
    "pipeline": "pipeline parallelism is Mesh(pp=), with Plan(data='fsdp2')",
    "fp16": "the compute dtype is Plan(dtype=), and float16 is not among them",
    "amp": "the compute dtype is Plan(dtype=)",
    "torch_autocast": "the compute dtype is Plan(dtype=)",
    "sparse_gradients": "embeddings keep dense gradients",
    "prescale_gradients": "gradients are sums over ranks, divided once",
    "elasticity": "batch sizes follow from the batches that are passed",
    "autotuning": "it starts jobs of its own",
    "hybrid_engine": "it replaces the model's layers",
    "compression_training": "it replaces the model's layers",
    "compile": "it reduces gradients past the engine",
    "zero_optimization.offload_optimizer": "the norm of offloaded gradients would leave out the experts of other ranks",
    "zero_optimization.offload_param": "it needs offload_optimizer, which is refused",
    "zero_optimization.zero_quantized_gradients": "its groups do not know experts",
    "zero_optimization.zero_quantized_weights": "its groups do not know experts",
    "zero_optimization.mics_shard_size": "its groups do not know experts",
    "zero_optimization.elastic_checkpoint": "its groups do not know experts",
    "zero_optimization.zenflow": "it reduces gradients past the engine",
    "zero_optimization.legacy_stage1": "DeepSpeed removed it",
}
# Fields that may only have this value.
_ONLY: dict[str, tuple[Any, str]] = {
    "zero_optimization.reduce_scatter": (True, "experts have groups of their own"),
    "zero_optimization.contiguous_gradients": (True, "experts have groups of their own"),
    "zero_optimization.zero_hpz_partition_size": (1, "experts have groups of their own"),
    "zero_optimization.compute_grad_norm": (True, "mw.clip_grad_norm_ returns the norm"),
    "gradient_predivide_factor": (1.0, "gradients are sums over ranks, divided once"),
    "gradient_allreduce_op": ("mean", "a rank's loss is scaled for the mean over ranks"),
    "managed_gradient_accumulation": (True, "mw.forward_backward says where a step ends"),
    "checkpoint.load_universal": (False, "mw.load reads what mw.save wrote"),
    "checkpoint.use_node_local_storage": (False, "a checkpoint is one folder that all ranks share"),
}


def check_zero(model: nn.Module, plan: Plan, sizes: MeshSizes) -> None:
    """Raise ValueError for what a ZeRO engine cannot run: axes, parameters, fields of the user's config, no deepspeed.
    Does nothing for other engines."""
    stage = plan.zero_stage
    if stage is None:
        return
    remedies = {
        "pp": "stages reduce gradients past DeepSpeed's engine. Set pp=1, or Plan(data='fsdp2')",
        "etp": "Set etp=1, or Plan(data='fsdp2')",
        "sp": "Set sp=1, or Plan(data='fsdp2')",
        "dp_replicate": "ZeRO partitions over all data ranks. Set dp_replicate=1 and multiply dp by it",
    }
    for axis, remedy in remedies.items():
        if getattr(sizes, axis) > 1:
            raise ValueError(f"{axis} ({getattr(sizes, axis)}) must be 1 with Plan(data={plan.data!r}): {remedy}.")
    for field in ("tp_sequence", "overlap", "grad_sync", "placement"):
        value, default = getattr(plan, field), getattr(Plan(), field)
        if value != default:
            given = "" if field == "placement" else f" ({value!r})"  # which is as long as the model has experts
            raise ValueError(
                f"Plan.{field}{given} must be {default!r} with Plan(data={plan.data!r}), or use data='fsdp2'."
            )
    if stage == 3 and sizes.tp > 1:
        raise ValueError(
            f"tp ({sizes.tp}) must be 1 with Plan(data='zero3'): split layers would keep gathered weights until their "
            "backward. Use 'zero2', or Plan(data='fsdp2')."
        )
    fill_config(plan, sizes.dp, check_params(model, plan))
    if find_spec("deepspeed") is None:
        raise ValueError(f"Plan(data={plan.data!r}) needs deepspeed. Install it: pip install 'moeweave[deepspeed]'.")


def check_params(model: nn.Module, plan: Plan) -> bool:
    """Whether the engine computes in bfloat16. Raises ValueError for parameters whose masters it would round."""
    dtypes = {param.dtype for param in model.parameters() if param.is_floating_point()}
    if odd := dtypes - {torch.float32, torch.bfloat16}:
        raise ValueError(
            f"Plan(data={plan.data!r}) keeps masters in float32, and {type(model).__name__} has parameters in "
            f"{', '.join(sorted(map(str, odd)))}. Convert it: model.to(torch.float32)."
        )
    compute = plan.torch_dtype or (torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32)
    if compute is torch.float32 and torch.bfloat16 in dtypes:
        raise ValueError(
            f"{type(model).__name__} has parameters in bfloat16, and Plan(data={plan.data!r}) computes in float32. "
            "Convert it, or set Plan(dtype='bfloat16')."
        )
    if compute is torch.bfloat16 and plan.zero_stage == 0:
        raise ValueError("Plan(data='zero0') has no float32 masters for parameters in bfloat16. Use 'zero1'.")
    return compute is torch.bfloat16


def read_config(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """A DeepSpeed config as a dict of its own, without the fields that say "auto".

    Raises ValueError for a path that is none or holds no JSON object.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return _without_auto(source)
    path = Path(source)
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"Plan.ds_config ({path}) cannot be read: {error.strerror}. Name a JSON file.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"Plan.ds_config ({path}) is no JSON: {error}. Correct the file.") from error
    if not isinstance(values, dict):
        raise ValueError(f"Plan.ds_config ({path}) must hold a JSON object, not a {type(values).__name__}.")
    return _without_auto(values)


def fill_config(plan: Plan, data_size: int, bf16: bool) -> dict[str, Any]:
    """The config that DeepSpeed gets: the user's, checked against plan and mesh, with the rest filled in.

    Args:
        data_size: data ranks. bf16: computes in bfloat16.

    Raises:
        ValueError: a field that contradicts plan or mesh, by name.
    """
    given = read_config(plan.ds_config)
    stage = plan.zero_stage
    for field, why in _REFUSED.items():
        value = _look_up(given, field)
        if value and not _is_off(value):
            raise ValueError(f"ds_config.{field} ({_shown(value)}) cannot be used here: {why}. Remove the field.")
    only = {**_ONLY, "zero_optimization.stage": (stage, f"Plan.data is {plan.data!r}")}
    for section in ("bf16", "bfloat16"):
        only[f"{section}.enabled"] = (bf16, f"Plan.dtype is {plan.dtype!r}")
    if bf16 and stage == 1:
        only["data_types.grad_accum_dtype"] = ("bf16", "with fp32 DeepSpeed takes an engine that knows no experts")
    for field, (wanted, why) in only.items():
        value = _look_up(given, field)
        if value is not None and value != wanted:
            raise ValueError(f"ds_config.{field} ({value!r}) must be {wanted!r}: {why}. Correct or remove the field.")
    given.pop("bfloat16", None)
    zero = {**given.get("zero_optimization", {}), "stage": stage}
    types = dict(given.get("data_types", {}))
    if bf16 and stage != 1:
        types.setdefault("grad_accum_dtype", "fp32")
    return {
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
        **given,
        **_batch_fields(given, data_size),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "data_types": types,
        "bf16": {**given.get("bf16", {}), "enabled": bf16},
    }


def _batch_fields(given: Mapping[str, Any], data_size: int) -> dict[str, int]:
    """The three sizes, of which DeepSpeed wants train = micro * accumulation * data ranks."""
    train, micro, steps = (given.get(name) for name in _BATCH)
    for name in _BATCH:
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"ds_config.{name} ({value!r}) must be a whole number of at least 1.")
    steps = steps or (train // (micro * data_size) if train and micro else 1)
    micro = micro or (train // (steps * data_size) if train else 1)
    if train is not None and train != micro * steps * data_size:
        raise ValueError(
            f"ds_config.train_batch_size ({train}) must be train_micro_batch_size_per_gpu * "
            f"gradient_accumulation_steps * data ranks ({micro} * {steps} * {data_size}). "
            "Correct it, or leave the three out: they follow from the batch and its micro-batches."
        )
    return dict(zip(_BATCH, (micro * data_size, micro, 1), strict=True))


def check_accumulation(plan: Plan, microbatches: int) -> None:
    """Raise ValueError where the user's config asks for another number of micro-batches."""
    steps = read_config(plan.ds_config).get("gradient_accumulation_steps", microbatches)
    if steps != microbatches:
        raise ValueError(
            f"microbatches ({microbatches}) contradicts ds_config.gradient_accumulation_steps ({steps}). Pass that "
            "many, or remove the field."
        )


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != "auto"
    }


def _is_off(section: Any) -> bool:
    return isinstance(section, Mapping) and (section.get("enabled") is False or section.get("device") == "none")


def _look_up(values: Mapping[str, Any], dotted: str) -> Any:
    found: Any = values
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
