"""`moeweave-submit`: one config, run on this machine, on hosts by ssh, on Slurm, on Kubernetes or by SkyPilot.

Hydra composes once, here. The ranks get a resolved file and the run folder, wherever they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeweave.launch import cli, compose, jobs, submission
from moeweave.launch.failure import HostFailed
from moeweave.launch.job import Job
from moeweave.launch.schema import BenchConfig, ConfigError, TrainConfig
from moeweave.launch.submit_schema import LAUNCHERS, AnyLauncher, SubmitConfig
from moeweave.launch.submit_schema import load as load_submit

PROGRAM = cli.Program(
    name="moeweave-submit",
    config="submit",
    summary=(
        "Runs a program on this machine, on hosts by ssh, on Slurm, on Kubernetes or by SkyPilot, from one config.\n"
        "Keys that are not listed here are the program's own: see moeweave-train --help and moeweave-bench --help.\n"
        "`moeweave-submit status|logs|stop RUN_FOLDER` is for what was submitted. A script's arguments follow `--`."
    ),
    examples=(
        ("moeweave-submit experiment=quickstart", "as moeweave-train would run it here"),
        (
            "moeweave-submit experiment=quickstart launcher=ssh launcher.hosts='[a,b]' show=true",
            "what two hosts would run",
        ),
        (
            "moeweave-submit experiment=qwen3_30b_64 launcher=slurm launcher.partition=gpu ranks_per_node=8",
            "on Slurm",
        ),
        ("moeweave-submit program=bench op=dispatch ranks=16 launcher=ssh launcher.hostfile=hosts", "time 16 ranks"),
        ("moeweave-submit program=my.py nodes=2 ranks_per_node=8 launcher=slurm -- --lr 3e-4", "a script of your own"),
    ),
    schema=SubmitConfig,
    whole_configs=False,
)
ASK = ("status", "logs", "stop")
PROGRAMS: dict[str, type] = {"train": TrainConfig, "bench": BenchConfig}
# Given to the program too: where run folders go is one setting for both.
SHARED = "run"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the job, or 0 once a queue has taken it; 2 for what cannot run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in ASK:
        return cli.run(PROGRAM, lambda _: _ask(arguments[0], arguments[1:]), [])
    words = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return cli.run(PROGRAM, lambda read: _body(read, words), own)


def _ask(what: str, folders: list[str]) -> int:
    if len(folders) != 1:
        raise ConfigError(f"moeweave-submit {what}: name one run folder, for example moeweave-submit {what} runs/mine.")
    found = submission.newest(Path(folders[0]).expanduser().absolute())
    control = LAUNCHERS[found.state["launcher"]](**found.state["options"])
    print(getattr(control, what)(found))
    return 0


def _body(arguments: cli.Arguments, words: list[str]) -> int:
    if arguments.config_file is not None or arguments.multirun:
        raise ConfigError("moeweave-submit takes neither --config nor --multirun. Give both to the program itself.")
    config, launcher, program = _compose(arguments)
    if arguments.show_config:
        print(compose.to_yaml(config) + ("" if program is None else f"---\n{compose.to_yaml(program)}"), end="")
        return 0
    run_folder = jobs.run_folder(config, program)
    place = submission.new(run_folder.path)
    job = jobs.make(config, launcher, program, words, place.path, run_folder.path, secrets.token_hex(16))
    text = launcher.render(job)  # raises for what cannot run there
    if program is not None:
        jobs.check_program(program, run_folder, local_data=config.launcher.kind in ("local", "ssh", "slurm"))
    if config.show:
        print(text, end="")
        return 0
    if config.check:
        _refuse(launcher.check(job), config.launcher.kind)
    return _submit(launcher, job, place, text)


def _compose(arguments: cli.Arguments) -> tuple[SubmitConfig, AnyLauncher, Any]:
    """moeweave-submit's config, its launcher, and the program's config (None for a script of the user's)."""
    fields = {field.name for field in dataclasses.fields(SubmitConfig)}
    keys = {text: compose.key_of(text).split(".")[0].split("@")[0] for text in arguments.overrides}
    own = [text for text in arguments.overrides if keys[text] in fields]
    rest = [text for text in arguments.overrides if keys[text] not in fields or keys[text] == SHARED]
    config, launcher = load_submit(compose.values(SubmitConfig, "submit", own, arguments.config_dir))
    if config.program not in PROGRAMS:
        _check_script(config.program)
        _refuse_unknown({keys[text] for text in rest} - {SHARED}, fields, config.program)
        return config, launcher, None
    schema = PROGRAMS[config.program]
    known = {field.name for field in dataclasses.fields(schema)} | set(compose.groups(arguments.config_dir))
    rest = [text for text in rest if keys[text] in known or keys[text] != SHARED]  # bench has no run folder of its own
    _refuse_unknown({keys[text] for text in rest} - known, fields | known, config.program)
    program: Any = compose.load(schema, config.program, rest, arguments.config_dir)
    if config.max_restarts is not None and isinstance(program, TrainConfig):
        program = dataclasses.replace(
            program, ranks=dataclasses.replace(program.ranks, max_restarts=config.max_restarts)
        )
    return config, launcher, program


def _check_script(program: str) -> None:
    if not program.endswith(".py"):
        near = difflib.get_close_matches(program, PROGRAMS, n=1)
        remedy = f"Did you mean program={near[0]}?" if near else "Name one of them, or the path of a .py file."
        raise ConfigError(f"program={program}: must be {', '.join(PROGRAMS)} or the path of a Python script. {remedy}")
    if not Path(program).is_file():
        raise ConfigError(f"program={program}: no such file. Name a script that is here.")


def _refuse_unknown(unknown: set[str], known: set[str], program: str) -> None:
    for name in sorted(unknown):
        if name.startswith("hydra"):
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1)
        remedy = f"Did you mean {near[0]}?" if near else "--help lists what there is."
        whose = f"moeweave-{program}" if program in PROGRAMS else "a script, whose own arguments follow `--`,"
        raise ConfigError(f"unknown config key {name}: neither moeweave-submit nor {whose} has it. {remedy}")


def _refuse(problems: list[str], kind: str) -> None:
    if problems:
        raise ConfigError(f"launcher={kind}: the check found\n  " + "\n  ".join(problems))
    print("check   every host can run it", flush=True)


def _submit(launcher: AnyLauncher, job: Job, place: submission.Submission, text: str) -> int:
    kind = launcher.kind
    submission.create(place, launcher=kind, options=dataclasses.asdict(launcher), name=job.name)
    suffix = {"slurm": "sbatch", "kubernetes": "yaml", "skypilot": "yaml"}.get(kind, "sh")
    (place.path / f"job.{suffix}").write_text(text)
    (place.path / "config.yaml").write_text(job.config)
    (place.path / "ranks").mkdir()
    print(f"submit  {place.path}", flush=True)
    try:
        return launcher.submit(job, place)
    except (ConfigError, HostFailed):
        place.finish(1)
        raise


if __name__ == "__main__":
    sys.exit(main())
