"""From the command line to a checked config: Hydra composes the YAML groups, the schemas check the result.

Hydra runs once, in the process that the user started; ranks get the finished config. Its compose API is used rather
than its decorator because every rank under torchrun would otherwise make an output folder of its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moeweave.launch.schema import ConfigError
from moeweave.launch.strict import build, check_name

T = TypeVar("T")

CONFIGS = Path(__file__).parent.parent / "configs"


def load(schema: type[T], program: str, overrides: Sequence[str], config_dir: str | None = None) -> T:
    """The config of `program` (a file of configs/) with `overrides` applied, as an instance of `schema`.

    `config_dir` is a folder of the user's own groups, searched beside the shipped ones. Raises ConfigError.
    """
    return build(schema, values(schema, program, overrides, config_dir))


def load_file(schema: type[T], path: str) -> T:
    """The config of a file that `to_yaml` wrote: what moeweave-submit hands to ranks. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--config {path}: no such file. Name a resolved config, such as a run folder's config.yaml.")
    try:
        found = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: holds no fields. Name a resolved config.")
    return build(schema, found)


def to_yaml(config: Any) -> str:
    """A config instance as YAML, every field in it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def key_of(text: str) -> str:
    """The key, or group, that one argument of the command line sets."""
    return _parse(text)[0].key_or_group


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Every config group and its options, from the shipped folder and the user's."""
    found: dict[str, set[str]] = {}
    for root in [CONFIGS, *([Path(config_dir)] if config_dir else [])]:
        for path in root.glob("*/*.yaml"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {name: sorted(options) for name, options in sorted(found.items())}


def values(schema: type, program: str, overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The composed values of `program` before they are checked as a whole. Raises ConfigError."""
    lines = hydra_lines(schema, overrides, config_dir)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIGS.absolute()), **version_base()):
            config = compose(config_name=program, overrides=lines)
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_paragraph(error)) from error


def hydra_lines(schema: type, overrides: Sequence[str], config_dir: str | None, sweep: bool = False) -> list[str]:
    """The command line as Hydra is given it, every name checked. `sweep` lets a key have several values."""
    options = groups(config_dir)
    lines = [line for text in overrides for line in _hydra_lines(*_parse(text), schema, options, sweep)]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder. Name a folder of YAML groups.")
        lines.append(f"hydra.searchpath=['file://{Path(config_dir).absolute()}']")
    return lines


def version_base() -> dict[str, str]:
    """Hydra 1.3 asks for a version base, 1.4 warns of one."""
    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}


def _parse(text: str) -> tuple[Override, str]:
    """The argument as Hydra reads it, and the text that it reads so: a path with = or ( in it needs quotes."""
    key, _, value = text.partition("=")
    quoted = f"{key}={_quote(value)}"
    may_quote = bool(value) and value[0] not in "[{'\""
    for candidate in (text, quoted) if may_quote else (text,):
        with suppress(HydraException):
            return OverridesParser.create().parse_override(candidate), candidate
    remedy = f"Quote the value: {quoted}" if value else "Write key=value."
    raise ConfigError(f"cannot read the argument {text!r} as key=value. {remedy}")


def _quote(value: str) -> str:
    """In single quotes, as Hydra's grammar has it: a backslash is special only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _hydra_lines(override: Override, text: str, schema: type, options: dict[str, list[str]], sweep: bool) -> list[str]:
    """What Hydra is given for one argument: groups as they are, values so that they may also be new keys of a dict."""
    name = override.key_or_group
    if name.startswith("hydra"):
        return [text]
    if override.is_sweep_override():
        if not sweep:
            raise ConfigError(
                f"{text}: several values for one key. Add --multirun for a run of each, or quote the value."
            )
        if name not in options:
            check_name(schema, name)
        return [text if name in options else "++" + text.lstrip("+")]
    if name in options and not isinstance(override.value(), dict):
        return _group_lines(name, str(override.value()), text, options[name])
    check_name(schema, name)
    if override.type == OverrideType.DEL:
        raise ConfigError(f"{text}: a key cannot be removed. Set {name}=null, or the value that you want.")
    return ["++" + text.lstrip("+")]


def _group_lines(name: str, value: str, text: str, options: list[str]) -> list[str]:
    if value in options or value in ("null", "None"):
        return [text]
    if name == "model":  # a model type, a config.json or a folder
        return ["model=hf", f"++model.source={_quote(value)}"]
    if name == "data" and Path(value).suffix:
        raise ConfigError(f"data={value}: data names a group of settings. For a file write data.path={value}.")
    raise ConfigError(
        f"{name}={value}: must be one of {', '.join(options)}. Choose one, or add {name}/{value}.yaml by --config-dir."
    )


def _first_paragraph(error: Exception) -> str:
    text = str(error).split("Config search path")[0]
    return " ".join(text.split()) + ("" if text.rstrip().endswith(".") else ".")
