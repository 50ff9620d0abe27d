"""Builds a Hugging Face model from its config alone: a model type, a config.json, or a folder that holds one.

Weights are random, nothing is downloaded. `moeweave.from_pretrained` is the way to a folder's own weights.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = ("auto", "tiny", "given")

# What `size="tiny"` sets on a config, and on its sub-configs, wherever they have the field.
TINY: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=48,
    ffn_hidden_size=96,
    expert_ffn_hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    zero_expert_num=4,
    moe_num_experts=8,
    num_experts_per_tok=2,
    moe_k=2,
    moe_topk=2,
    top_k_experts=2,
    n_group=2,
    topk_group=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    shared_intermediate_size=48,
    shared_expert_intermediate_size=48,
    shared_experts_intermediate_size=48,
    moe_shared_expert_intermediate_size=48,
    first_k_dense_replace=1,
    sliding_window=16,
    index_topk=16,
    index_head_dim=16,
    index_n_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_head_dim=16,
    linear_num_heads=4,
    n_shared_experts=1,
    attn_layer_period=2,
    attn_layer_offset=1,
)
# What TINY cannot say for all: rules that one architecture alone has.
TINY_OF: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# Lists with one entry per layer, cut when an override asks for fewer layers than the file has.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "moe_layer_freq", "no_rope_layers")


def build_model(
    source: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    size: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> nn.Module:
    """Builds the model that `source` describes, randomly initialised, in training mode.

    `source` is a model type ("qwen3_moe"), the path of a config.json, or a folder with one; `overrides` replaces
    fields of that config. `size="given"` keeps the config's own sizes, "tiny" shrinks them to what one core trains,
    "auto" is tiny for a bare model type and given for a file. `device="meta"` allocates nothing.

    Raises ValueError when the source, a field or the size is unknown (the nearest name is offered), and when no
    model class of transformers takes that config.
    """
    config = load_config(source, overrides, size=size)
    model_class = _model_class(config)
    extra = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device(device if device is not None else "cpu"):
            model: nn.Module = model_class.from_config(config, dtype=dtype, **extra)
    except (TypeError, AttributeError, KeyError) as error:  # a field that has no default of use, read while building
        raise ValueError(
            f"model {source!r}: {model_class.__name__} cannot be built from its config: {error}. "
            "Set the fields it needs as model overrides, or name a config.json that has them."
        ) from error
    return model.train()


def load_config(source: str, overrides: Mapping[str, Any] | None = None, *, size: str = "auto") -> Any:
    """The transformers config that `build_model` builds from; arguments and errors are the same."""
    if size not in SIZES:
        raise ValueError(f"model size {size!r} is unknown. Use one of {', '.join(SIZES)}.")
    if find_spec("transformers") is None:
        raise ValueError(f"model source {source!r} needs transformers. Install it: pip install 'moeweave[hf]'.")
    overrides = dict(overrides or {})
    path = _config_file(source)
    if path is not None:
        config_class, fields = _read(path)
        shrink = size == "tiny"
    else:
        config_class, fields = _class_of(source), {}
        shrink = size != "given"
    _check_overrides(config_class, fields, overrides, source)
    if shrink:
        fields = _merge(fields, tiny_fields(config_class, fields))
    fields = _merge(fields, overrides)
    if not shrink and "num_hidden_layers" in overrides:
        _cut_layers(fields, overrides["num_hidden_layers"])
    try:
        return config_class.from_dict(fields)
    except Exception as error:  # each architecture has rules of its own, and its own kinds of error for them
        reason = " ".join(str(error).split())
        how = "its tiny sizes" if shrink else "its fields"
        raise ValueError(
            f"model {source!r}: {config_class.__name__} refuses {how}: {reason}. "
            "Set the fields it names as model overrides, or use size given."
        ) from error


def tiny_fields(config_class: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of TINY which that config class, and its sub-configs, know. Lists per layer fall back to defaults."""
    known = _known_fields(config_class)
    tiny = {name: value for name, value in TINY.items() if name in known}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        tiny["num_key_value_heads"] = TINY["num_attention_heads"]  # latent attention has a key head for each query head
    tiny |= {name: None for name in PER_LAYER if fields.get(name) is not None}
    for name, sub_class in _sub_configs(config_class):
        tiny[name] = tiny_fields(sub_class, fields.get(name) or {})
    if not fields and "num_hidden_layers" in tiny:
        tiny["num_hidden_layers"] = max(TINY["num_hidden_layers"], _layers_with_attention(config_class))
    return tiny | TINY_OF.get(config_class.model_type, {})


def _layers_with_attention(config_class: Any) -> int:
    """How many layers of the default pattern to take for one with softmax attention, which some models need; 0: any."""
    default = config_class()
    kinds = getattr(default, "layer_types", None) or getattr(default, "layers_block_type", None) or []
    softmax = [i for i, kind in enumerate(kinds) if "attention" in kind and "linear" not in kind]
    return softmax[0] + 1 if softmax and softmax[0] < 8 else 0


def _config_file(source: str) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model source {source!r} is a folder without a config.json. Name a folder that has one.")
        return path / "config.json"
    if path.is_file():
        return path
    if path.suffix == ".json" or "/" in source:
        raise ValueError(
            f"model source {source!r} does not exist. Name a model type (qwen3_moe), a config.json, or a local folder "
            "with one; models are not downloaded."
        )
    return None


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model config {path} is not JSON ({error}). Name a config.json.") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"model config {path} has no field model_type, so its architecture is unknown. Add it.")
    config_class = _class_of(fields["model_type"])
    # Read again by transformers, which turns back the forms that it writes infinite numbers in.
    return config_class, config_class.get_config_dict(str(path))[0]


def _class_of(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ValueError(
            f"model type {model_type!r} is not one of the installed transformers.{hint} "
            "A source may also be the path of a config.json or of a folder with one."
        )
    return CONFIG_MAPPING[model_type]


def _model_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(
        f"model type {config.model_type!r}: transformers has no model class for {type(config).__name__} alone. "
        "It may be a part of a larger config; name the whole model."
    )


def model_class_of(config: Any) -> Any:
    """The class of transformers that a config describes, the one its Auto classes take. Raises ValueError."""
    return _model_class(config)._model_mapping[type(config)]


def _check_overrides(config_class: Any, fields: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> None:
    known = _known_fields(config_class) | set(fields)
    subs = dict(_sub_configs(config_class))
    for name, value in overrides.items():
        if name not in known and name not in subs and not _read_by_model(config_class, name):
            near = difflib.get_close_matches(name, sorted(known | set(subs)), n=3)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise ValueError(f"model override {name!r} is no field of the config of {source!r}.{hint}")
        if name in subs and isinstance(value, Mapping):
            _check_overrides(subs[name], fields.get(name) or {}, value, f"{source} {name}")


def _known_fields(config_class: Any) -> set[str]:
    """Names that the class takes: its own fields and, for classes without a plain signature, its attributes."""
    names = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs", "args"}
    for base in config_class.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    return {name for name in names if not name.startswith("_")} | set(getattr(config_class, "attribute_map", {}))


def _read_by_model(config_class: Any, name: str) -> bool:
    """Whether the architecture's own code reads config.<name>, as some do with fields that they do not declare."""
    folder = Path(inspect.getfile(config_class)).parent
    pattern = re.compile(rf"config\.{re.escape(name)}\b|getattr\(\w*config, \"{re.escape(name)}\"")
    return any(pattern.search(path.read_text(encoding="utf-8")) for path in folder.glob("modeling_*.py"))


def _sub_configs(config_class: Any) -> Iterator[tuple[str, Any]]:
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if inspect.isclass(sub_class) and hasattr(sub_class, "model_type"):
            yield name, sub_class


def _merge(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged


def _cut_layers(fields: dict[str, Any], num_layers: int) -> None:
    for name in PER_LAYER:
        if isinstance(fields.get(name), list):
            fields[name] = fields[name][:num_layers]
