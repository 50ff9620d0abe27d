"""Between a model's parameter names and the keys of its files on disk, by transformers' own conversion mapping.

Everything here that leans on transformers' internals is in this file (`transformers.core_model_loading` and
`transformers.conversion_mapping`, alike from 5.0 on). Both directions work on lazy tensors, so they read nothing: they
say, for a parameter, which slices of which keys it is made of, and for a key, which slices of which parameters.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.hf.lazy import LazyTensor
from moeweave.parallel.names import model_class


def is_hugging_face(model: nn.Module) -> bool:
    """Whether `model` is a transformers model (asked without importing transformers)."""
    return hasattr(model, "config") and any(
        base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__
    )


def build_empty(kind: Any, config: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
    """A model of class `kind` with its parameters on meta and its buffers real, computed by the constructor.

    Parameters and buffers that transformers keeps in float32 whatever the dtype are float32.
    """

    def to_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None or param.is_meta:
            return None
        return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    handle = nn.modules.module.register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = kind._from_config(copy.deepcopy(config), dtype=dtype, **kwargs)
    finally:
        handle.remove()
    for name in keep_in_fp32(model, model.state_dict(), dtype):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf in owner._parameters:
            param = owner._parameters[leaf]
            owner._parameters[leaf] = nn.Parameter(param.detach().float(), requires_grad=param.requires_grad)
        else:
            owner._buffers[leaf] = owner._buffers[leaf].float()
    return model


def blueprint(model: Any) -> Any:
    """An empty model of the same class and config as `model`.

    It is what transformers' mappings are asked with, because they go by class names, which FSDP changes, and it holds
    the values of buffers that only a constructor computes (rotary frequencies).
    """
    dtype = getattr(model.config, "dtype", None) or torch.get_default_dtype()
    twin = build_empty(model_class(model), model.config, dtype)
    if (conversions := vars(model).get("_weight_conversions")) is not None:
        twin._weight_conversions = conversions
    return twin


def computed_buffers(twin: Any) -> dict[str, Tensor]:
    """The buffers of a blueprint that no checkpoint holds, by name."""
    persistent = set(twin.state_dict())
    return {name: buffer for name, buffer in twin.named_buffers() if name not in persistent}


def ignored_on_save(twin: Any) -> set[str]:
    return set(twin._keys_to_ignore_on_save or ())


def ignorable(twin: Any, which: str) -> Callable[[str], bool]:
    """Whether transformers lets a name be "missing" from a folder, or a key of it be "unexpected"."""
    patterns = set(getattr(twin, f"_keys_to_ignore_on_load_{which}", None) or ())
    if which == "unexpected":
        # Once saved, now computed.
        patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    found = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in found)


def keep_in_fp32(twin: Any, names: Iterable[str], dtype: torch.dtype) -> list[str]:
    """Which of `names` stay float32 in a model of a half precision `dtype`, as transformers keeps them."""
    patterns = set(twin._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(twin._keep_in_fp32_modules_strict or ())
    found = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    return [name for name in names if any(pattern.search(name) for pattern in found)]


@dataclass(frozen=True)
class Reading:
    """How a folder's keys make a model's parameters.

    Attributes:
        values: per parameter or buffer name, a lazy tensor over the keys it is made of.
        keys: the keys behind each name.
        unexpected: keys that nothing in the model takes.
        conversions: the mapping that was used; kept on the model, saving reverts it.
    """

    values: dict[str, LazyTensor]
    keys: dict[str, list[str]]
    unexpected: list[str]
    conversions: list[Any]


def plan_reading(twin: Any, disk: Mapping[str, LazyTensor], path: Path) -> Reading:
    """Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`, on lazy tensors. `path` is for
    errors.

    Raises CheckpointError when the keys of a parameter cannot be put together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(twin)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    model_state, prefix = twin.state_dict(), twin.base_model_prefix

    groups: dict[str, Any] = {}
    group_keys: dict[str, list[str]] = {}
    unexpected = []
    for key in sorted(disk, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, model_state)
        if name not in model_state and key in model_state:
            name, pattern = rename_source_key(key, [], [], prefix, model_state)
        if name not in model_state:
            unexpected.append(key)
            continue
        if name not in groups:
            # Each target has a converter of its own, which collects its tensors.
            groups[name] = WeightRenaming(key, name) if pattern is None else copy.deepcopy(by_pattern[pattern])
        groups[name].add_tensor(name, key, key if pattern is None else pattern, disk[key])
        group_keys.setdefault(name, []).append(key)

    values: dict[str, LazyTensor] = {}
    keys: dict[str, list[str]] = {}
    for name, group in groups.items():
        try:
            converted = _convert(group, name, twin)
        except Exception as error:
            made_of = group_keys[name]
            raise CheckpointError(
                f"{path}: {name} cannot be put together from {len(made_of)} keys ({made_of[0]!r}, ...): "
                f"{' '.join(str(error).split())}.{oddity(made_of, disk)} "
                "The folder is damaged, or of another model than its config.json says."
            ) from error
        for target, value in converted.items():
            values[target] = value[0] if isinstance(value, list) else value
            keys[target] = group_keys[name]
    used = [one for one in mapping if not hasattr(one, "was_used") or one.was_used()]
    return Reading(values, keys, unexpected, used)


def _convert(group: Any, name: str, twin: Any) -> Any:
    result = group.convert(name, model=twin, config=twin.config)
    return result[0] if isinstance(result, tuple) else result


def oddity(keys: Iterable[str], disk: Mapping[str, LazyTensor]) -> str:
    """What is wrong with a numbered list of keys, in words: a number left out, or a shape unlike the others'."""
    forms: dict[str, dict[int, str]] = {}
    for key in keys:
        *_, at = [None, *re.finditer(r"\d+", key)]
        if at is not None:
            forms.setdefault(f"{key[: at.start()]}{{}}{key[at.end() :]}", {})[int(at.group())] = key
    size = max((max(numbered) + 1 for numbered in forms.values()), default=0)
    for form, numbered in forms.items():
        if lost := sorted(set(range(size)) - set(numbered)):
            return f" {form.format(lost[0])!r} is not there."
        shapes = Counter(tuple(disk[key].shape) for key in numbered.values())
        usual = shapes.most_common(1)[0][0]
        if odd := next((key for key in numbered.values() if tuple(disk[key].shape) != usual), None):
            return f" {odd!r} has shape {tuple(disk[odd].shape)}, the others {usual}."
    return ""


def plan_writing(twin: Any, state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The keys of the model's files on disk as lazy tensors over its parameters and buffers."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(twin, dict(state)))


def _natural(key: str) -> list[tuple[Any, ...]]:
    """Sorts experts.2 before experts.10, and w2 before w10: the order in which lists of keys are stacked."""
    order: list[tuple[Any, ...]] = []
    for part in key.split("."):
        text = part.rstrip("0123456789")
        number = int(part[len(text) :]) if len(text) < len(part) else -1
        order.append((1, text, number) if text else (0, "", number))
    return order
