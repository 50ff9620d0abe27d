"""Hugging Face folders in and out: `from_pretrained` builds on meta and reads only its shards, `save_pretrained` writes
the family's own format from several ranks at once. Nothing is downloaded."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeweave.parallel.agreement import CheckpointError, rank, together
from moeweave.parallel.checkpoint_engine import whole
from moeweave.parallel.hf.build import load_config, model_class_of
from moeweave.parallel.hf.conversion import (
    blueprint,
    build_empty,
    ignored_on_save,
    is_hugging_face,
    plan_writing,
)
from moeweave.parallel.hf.files import INDEX, WeightsFolder
from moeweave.parallel.hf.lazy import LazyTensor
from moeweave.parallel.hf.peft_files import has_adapters, write_adapters
from moeweave.parallel.hf.reader import load_weights
from moeweave.parallel.hf.writer import describe, plan_layout, write_index, write_share
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.names import copied_names, model_class, named_params, named_state, tied_groups, unwrap
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.placed import slots_of_params
from moeweave.parallel.plan import Plan
from moeweave.parallel.staging import publish, settle, stage

logger = logging.getLogger("moeweave")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def from_pretrained(
    path: str | Path,
    mesh: Mesh,
    plan: Plan | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> Any:
    """The model of a Hugging Face folder, spread over `mesh`. A collective.

    It is built on meta, wrapped by `parallelize`, given memory on the mesh's device, and each rank reads from the
    safetensors files only the slices that it holds: of experts, its own. Like transformers' own `from_pretrained` it
    returns the model in eval mode; call `.train()` to train it.

    Args:
        path: a local folder with config.json and safetensors weights.
        mesh, plan: as for `parallelize`.
        dtype: of the parameters; "auto" is the config's, or that of the weights. (`Plan.dtype` is the compute dtype.)
        attn_implementation: as in transformers.
        config_overrides: fields of the config to replace.

    Raises:
        CheckpointError: no such folder; damaged, quantised or foreign weights. On all ranks alike.
        ValueError: a config field that does not exist; a model or plan that `parallelize` refuses.
    """
    folder = Path(path).expanduser()
    with together():
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder. Name a local one with config.json; nothing is downloaded."
            )
        config = load_config(str(folder), config_overrides, size="given")
        _refuse_quantised(folder, config)
        params_dtype = _params_dtype(folder, config, dtype)
        kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        config.name_or_path = str(folder)
        model = build_empty(_class_for(config), config, params_dtype, **kwargs)
    parallelize(model, mesh, plan)
    load_weights(folder, model, mesh.device)
    with together():
        if model.can_generate() and (folder / "generation_config.json").exists():
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def save_pretrained(model: nn.Module, path: str | Path, *, max_shard_size: int | str = "5GB") -> Path:
    """Writes the model as a Hugging Face folder: config, generation config, safetensors files and their index, with the
    keys and shapes that the family has on disk. A collective; every rank writes files of its own, and none holds the
    whole model. The folder appears when it is complete; other files of a folder it replaces (tokenizer) are kept.

    A model that is not of transformers is written under its own names, without config. Of a model that peft wraps the
    adapters are written, as peft does; `merge_and_unload()` them before `parallelize` to write the whole.

    Args:
        path: the folder.
        max_shard_size: most bytes in a file (a single larger tensor excepted), also as "500MB"; what a rank collects
            in memory before it writes.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written; a size that is none.
    """
    model, folder = unwrap(model), Path(path)
    if has_adapters(model):
        return _save_adapters(model, folder)
    with whole(model):
        return _save(model, folder, max_shard_size)


def _save(model: Any, folder: Path, max_shard_size: int | str) -> Path:
    with together():
        max_bytes = _size_in_bytes(max_shard_size)
        twin = blueprint(model) if is_hugging_face(model) else None
        dropped = {name for names in tied_groups(model) for name in _copies(names, twin)}
        dropped |= set(copied_names(model))
        dropped |= set() if twin is None else ignored_on_save(twin)
        state = {name: tensor for name, tensor in named_state(model).items() if name not in dropped}
    staged = stage(folder)

    def to_disk(lazy: dict[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        return lazy if twin is None else plan_writing(twin, lazy)

    export = describe(state, to_disk, slots_of_params(model))
    layout = plan_layout(export, max_bytes)
    write_share(staged, export, layout)
    with together():
        if rank() == 0:
            params = set(named_params(model)) | (export.specs.keys() - state.keys())
            numel = (torch.Size(sizes).numel() for name, (sizes, _) in export.specs.items() if name in params)
            write_index(staged, export, layout, sum(numel))
            if twin is not None:
                _write_configs(model, staged)
            _keep_others(folder, staged)
            publish(staged, folder)
            settle(folder)
    logger.info("wrote %d files to %s", len(set(layout.weight_map.values())), folder)
    return folder


def _save_adapters(model: nn.Module, folder: Path) -> Path:
    staged = stage(folder)
    write_adapters(model, staged)
    with together():
        if rank() == 0:
            _keep_others(folder, staged)
            publish(staged, folder)
            settle(folder)
    return folder


def _class_for(config: Any) -> Any:
    """The class that the config names as its architecture; else the one that transformers' auto classes take."""
    import transformers

    for name in config.architectures or ():
        if (kind := getattr(transformers, name, None)) is not None:
            return kind
    return model_class_of(config)


def _refuse_quantised(folder: Path, config: Any) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{folder} holds quantised weights (quantization_config: {method!r}), which cannot be trained as they are. "
            "Load it with transformers, dequantised, and save it again with save_pretrained()."
        )


def _params_dtype(folder: Path, config: Any, dtype: torch.dtype | str) -> torch.dtype:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or next(
            (s.dtype for s in WeightsFolder(folder).sources.values() if s.dtype.is_floating_point), torch.float32
        )
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype ({dtype!r}) must be 'auto' or a floating-point dtype, e.g. torch.bfloat16.")
    return dtype


def _size_in_bytes(size: int | str) -> int:
    text = str(size).strip().upper()
    number, unit = (text[:-2], _UNITS[text[-2:]]) if text[-2:] in _UNITS else (text, 1)
    try:
        count = int(float(number) * unit)
    except ValueError:
        count = 0
    if count < 1:
        raise CheckpointError(
            f"max_shard_size ({size!r}) must be a number of bytes, or like '5GB' ({', '.join(_UNITS)})."
        )
    return count


def _copies(names: list[str], twin: Any) -> list[str]:
    """Of names that share a parameter, those that are not written."""
    tied = {} if twin is None else getattr(twin, "all_tied_weights_keys", {})
    kept = next((name for name in names if name not in tied), names[0])
    return [name for name in names if name != kept]


def _write_configs(model: Any, staged: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [model_class(model).__name__]
    config.dtype = next(
        (str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), None
    )
    config.save_pretrained(staged)
    if model.can_generate():
        model.generation_config.save_pretrained(staged)


def _keep_others(folder: Path, staged: Path) -> None:
    """Copies what the new folder does not replace: tokenizer files and the like, not weights of the old one."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        weights = entry.name == INDEX or (entry.name.startswith("model") and entry.suffix == ".safetensors")
        if not weights and not (staged / entry.name).exists():
            (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, staged / entry.name)
