"""From the command line to a checked config: Hydra composes the YAML groups, the schemas check the result.

Hydra runs once, in the process that the user started; ranks get the finished config. Its compose API is used rather
than its decorator because every rank under torchrun would otherwise make an output folder of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from moeweave.launch.schema import ConfigError, build, check_name

T = TypeVar("T")

CONFIGS = Path(__file__).parent.parent / "configs"


def load(schema: type[T], program: str, overrides: Sequence[str], config_dir: str | None = None) -> T:
    """The config of `program` (a file of configs/) with `overrides` applied, as an instance of `schema`.

    `config_dir` is a folder of the user's own groups, searched beside the shipped ones. Raises ConfigError.
    """
    return build(schema, _compose(schema, program, overrides, config_dir))


def to_yaml(config: Any) -> str:
    """A config instance as YAML, every field in it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Every config group and its options, from the shipped folder and the user's."""
    found: dict[str, set[str]] = {}
    for root in [CONFIGS, *([Path(config_dir)] if config_dir else [])]:
        for path in root.glob("*/*.yaml"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {name: sorted(options) for name, options in sorted(found.items())}


def _compose(schema: type, program: str, overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    options = groups(config_dir)
    lines = [line for text in overrides for line in _hydra_lines(*_parse(text), schema, options)]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder. Name a folder of YAML groups.")
        lines.append(f"hydra.searchpath=['file://{Path(config_dir).absolute()}']")
    GlobalHydra.instance().clear()
    # Hydra 1.3 asks for a version base, 1.4 warns of one.
    base = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}
    try:
        with initialize_config_dir(config_dir=str(CONFIGS.absolute()), **base):
            config = compose(config_name=program, overrides=lines)
    except HydraException as error:
        raise ConfigError(_first_paragraph(error)) from error
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


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


def _hydra_lines(override: Override, text: str, schema: type, options: dict[str, list[str]]) -> list[str]:
    """What Hydra is given for one argument: groups as they are, values so that they may also be new keys of a dict."""
    name = override.key_or_group
    if name.startswith("hydra"):
        return [text]
    if override.is_sweep_override():
        raise ConfigError(f"{text}: several values for one key. Run the program once for each, or quote the value.")
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
