"""Values merged into a config's dataclass, strictly: no name that it lacks, no value of another type."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moeweave.launch.schema import ConfigError
from moeweave.parallel.plan import Plan

T = TypeVar("T")

# Dicts of a config whose keys are another package's dataclass, and those whose keys are free.
TYPED_DICTS: dict[str, type] = {"plan": Plan}
FREE_DICTS = {"model.overrides", "env"}


def build(schema: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `schema` with `values` merged over its defaults. Raises ConfigError."""
    for name, value in values.items():
        _check_names(schema, name, value)
    try:
        merged = OmegaConf.merge(_writable(OmegaConf.structured(schema)), dict(values))
        built: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        if "is not a ListConfig" in first_line:
            raise ConfigError(f"{error.full_key}: must be a list. Write {error.full_key}='[...]'.") from error
        raise ConfigError(f"{error.full_key or schema.__name__}: {first_line}. Correct the value.") from error
    return built


def check_name(schema: type, name: str) -> None:
    """Raises ConfigError with the nearest name when dotted `name` is no field of the dataclass `schema`."""
    legal, path = _fields(schema), ""
    for part in name.split("."):
        if part not in legal:
            near = [path + other for other in difflib.get_close_matches(part, legal, n=1)] or _elsewhere(schema, part)
            remedy = f"Did you mean {near[0]}?" if near else "--help lists all of them."
            group = f" of {path[:-1]}" if path else ""
            raise ConfigError(f"unknown config key {path + part}: the fields{group} are {', '.join(legal)}. {remedy}")
        path += f"{part}."
        inner = legal[part]
        if path[:-1] in FREE_DICTS:
            return
        inner = TYPED_DICTS.get(path[:-1], inner)
        if not dataclasses.is_dataclass(inner):
            # A value, or a dict of another package, which checks it for itself.
            rest = name[len(path) :]
            if rest and inner in (int, float, str, bool):
                raise ConfigError(f"unknown config key {name}: {path[:-1]} is one value, not a group of fields.")
            return
        legal = _fields(inner)


def _check_names(schema: type, name: str, value: Any) -> None:
    check_name(schema, name)
    kind = TYPED_DICTS.get(name, _fields(schema).get(name))
    if dataclasses.is_dataclass(kind) and not isinstance(value, Mapping):
        shown = ", ".join(f"{name}.{inner}" for inner in _fields(kind))
        raise ConfigError(f"{name}={value}: is a group of fields, not one value. Set one of {shown}.")
    if isinstance(value, Mapping) and name not in FREE_DICTS:
        for inner_name, inner_value in value.items():
            _check_names(schema, f"{name}.{inner_name}", inner_value)


def _fields(schema: Any) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def _elsewhere(schema: Any, part: str) -> list[str]:
    """Where a field of that name, or nearly, lives in a group: lr is optim.lr."""
    kinds = {group: TYPED_DICTS.get(group, kind) for group, kind in _fields(schema).items()}
    inner = {
        f"{group}.{name}": name
        for group, kind in kinds.items()
        if dataclasses.is_dataclass(kind)
        for name in _fields(kind)
    }
    near = difflib.get_close_matches(part, list(inner.values()), n=1, cutoff=0.7)
    return [path for path, name in inner.items() if near and name == near[0]]


def _writable(node: DictConfig) -> DictConfig:
    """OmegaConf takes frozen dataclasses for read-only nodes; merging fills them before they are built."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        if isinstance(node._get_node(name), DictConfig):
            _writable(node[name])
    return node
