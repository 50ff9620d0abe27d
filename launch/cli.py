"""What the Hydra-style programs share: reading argv, help, and turning errors into one line and an exit code.

Exit codes: 0 done, 1 a rank failed or a proof did, 2 the config cannot run (nothing was started), 130 interrupted.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeweave.launch import compose, env
from moeweave.launch.failure import HostFailed, RankFailed


@dataclass(frozen=True)
class Program:
    """One program: its name, its file in configs/, what it does, and command lines that work as they stand."""

    name: str
    config: str
    summary: str
    examples: tuple[tuple[str, str], ...]
    schema: type
    whole_configs: bool = True  # takes --config and --multirun


@dataclass(frozen=True)
class Arguments:
    """argv taken apart: key=value overrides, and what the flags ask for."""

    overrides: tuple[str, ...]
    config_dir: str | None = None
    show_config: bool = False
    config_file: str | None = None
    multirun: bool = False


WHOLE_CONFIGS = (
    "  --config FILE       take the whole config from FILE, as --cfg prints it",
    "  --multirun          a run for each value of a=1,2 (Hydra's sweeps)",
)


def run(program: Program, body: Callable[[Arguments], int], argv: Sequence[str] | None = None) -> int:
    """Runs `body`, usually `starting(...)`, and returns the exit code; errors become what a person can read."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(help_text(program))
        return 0
    try:
        return body(_read(arguments))
    except (RankFailed, HostFailed) as error:
        return _fail(program, str(error), 1)
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, NotImplementedError) as error:
        return _fail(program, str(error), 2)
    except OSError as error:
        return _fail(program, str(error), 1)
    except KeyboardInterrupt as error:
        return _fail(program, str(error) or "interrupted", getattr(error, "code", 130))


def _read(arguments: list[str]) -> Arguments:
    overrides: list[str] = []
    config_dir = config_file = None
    show_config = multirun = False
    rest = iter(arguments)
    for argument in rest:
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            config_dir = value or next(rest, "")
        elif flag == "--config":
            config_file = value or next(rest, "")
        elif argument in ("--cfg", "-c"):
            show_config = True
        elif argument in ("--multirun", "-m"):
            multirun = True
        elif argument.startswith("-"):
            raise ValueError(
                f"unknown option {argument}. "
                "The options are --help, --cfg, --multirun, --config FILE and --config-dir DIR."
            )
        else:
            overrides.append(argument)
    if config_file is not None and (overrides or config_dir or multirun):
        raise ValueError(f"--config {config_file}: is a whole config, to which nothing is added. Leave out the rest.")
    return Arguments(tuple(overrides), config_dir, show_config, config_file, multirun)


def starting(program: Program, start: Callable[[Any], int]) -> Callable[[Arguments], int]:
    """The body of a program that runs one checked config: `start(config)`, a sweep of it, or the config printed."""

    def body(arguments: Arguments) -> int:
        if arguments.multirun:
            # Imported here: the sweep imports this module.
            from moeweave.launch import sweep

            return sweep.run(program, start, arguments)
        config = config_of(program, arguments)
        if arguments.show_config:
            print(compose.to_yaml(config), end="")
            return 0
        return start(config)

    return body


def config_of(program: Program, arguments: Arguments) -> Any:
    """The config that argv asks for, checked: a whole file, or composed from groups and key=value arguments."""
    if arguments.config_file is not None:
        return compose.load_file(program.schema, arguments.config_file)
    return compose.load(program.schema, program.config, arguments.overrides, arguments.config_dir)


def _fail(program: Program, message: str, code: int) -> int:
    if env.wants_traceback():
        traceback.print_exc()
    ranks = env.launched_ranks()
    if ranks is None or ranks.rank == 0:
        print(f"{program.name}: error: {message}", file=sys.stderr)
    return code


# ---- help


def help_text(program: Program) -> str:
    """Usage, worked command lines, groups, and every field with its default and the comment above it in YAML."""
    whole = " [--config FILE] [--multirun]" if program.whole_configs else ""
    usage = f"usage: {program.name} [--help] [--cfg]{whole} [--config-dir DIR] [key=value ...]"
    lines = [usage, "", program.summary, ""]
    lines += ["examples:"]
    for command, meaning in program.examples:
        lines += [f"  {command}", f"      {meaning}"]
    lines += [
        "",
        "options:",
        "  --cfg               print the resolved config and stop",
        *(WHOLE_CONFIGS if program.whole_configs else ()),
        "  --config-dir DIR    search DIR for groups of your own too: DIR/experiment/mine.yaml is experiment=mine",
    ]
    top = (compose.CONFIGS / f"{program.config}.yaml").read_text()
    chosen = dict(re.findall(r"^  - (\w+): (\w+)$", top, re.MULTILINE))
    options = compose.groups()
    lines += ["", "groups (group=option):"] if chosen else []
    for name, default in chosen.items():
        shown = [f"{option} (default)" if option == default else option for option in options.get(name, [])]
        shown += ["any model type, config.json or folder"] if name == "model" else []
        lines.append(f"  {name + '=':<14}{', '.join(shown)}")
    lines += ["", "fields (key=value):"]
    fields = _fields(top, "")
    for name, default in chosen.items():
        if default != "null" and name != "launcher":
            option = "hf" if name == "model" else default
            fields += _fields((compose.CONFIGS / name / f"{option}.yaml").read_text(), f"{name}.")
    lines += _shown(fields)
    for option in options["launcher"] if "launcher" in chosen else []:
        lines += _launcher_help(option)
    return "\n".join(lines)


def _launcher_help(option: str) -> list[str]:
    """The fields that `launcher=option` adds; of a preset, which builds on another launcher, what it sets."""
    text = (compose.CONFIGS / "launcher" / f"{option}.yaml").read_text()
    if base := re.search(r"^  - (\w+)@launcher$", text, re.MULTILINE):
        return ["", f"launcher={option} is launcher={base[1]} with:", *_shown(_fields(text, ""))]
    fields = [field for field in _fields(text, "launcher.") if field[0] != "launcher.kind"]
    return ["", f"fields with launcher={option}:", *_shown(fields)] if fields else []


def _shown(fields: list[tuple[str, str, str]]) -> list[str]:
    return [line for name, value, meaning in fields for line in (f"  {name}={value}", f"      {meaning}")]


def _fields(text: str, prefix: str) -> list[tuple[str, str, str]]:
    """(dotted name, default, comment above) of every field in a shipped YAML file."""
    found: list[tuple[str, str, str]] = []
    comment, group = "", ""
    body = re.sub(r"^defaults:\n(  - .*\n)+", "", text, flags=re.MULTILINE)
    for line in body.splitlines():
        if match := re.match(r"^( *)# (.*)$", line):
            comment = match[2] if not comment else f"{comment} {match[2]}"
        elif match := re.match(r"^( *)(\w+):(?: (.*))?$", line):
            group = "" if not match[1] else group
            if match[3] is None:
                group = f"{match[2]}."
            else:
                found.append((prefix + group + match[2], match[3], comment))
            comment = ""
        elif not line.strip():
            comment = ""
    return found


def shown_command(program: Program) -> list[str]:
    """The command line as the user would type it again."""
    as_module = Path(sys.argv[0]).suffix == ".py"
    return [*(["python", "-m", f"moeweave.launch.{program.config}"] if as_module else [program.name]), *sys.argv[1:]]
