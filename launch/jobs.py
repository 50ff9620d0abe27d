"""From checked configs to a `Job`: how many hosts and ranks, which command, which folders."""

from __future__ import annotations

import dataclasses
import re
import site
from pathlib import Path
from typing import Any

from moeweave.launch import compose, prepare, remesh, runlog
from moeweave.launch.job import Job
from moeweave.launch.schema import BenchConfig, ConfigError, TrainConfig
from moeweave.launch.submit_schema import AnyLauncher, SubmitConfig

MODULES = {"train": "moeweave.launch.train", "bench": "moeweave.launch.bench"}


def run_folder(config: SubmitConfig, program: Any) -> runlog.RunFolder:
    """The run folder that the program's config names, or a new one."""
    if isinstance(program, TrainConfig):
        return runlog.choose(program.run.root, program.run.dir, program.name)
    return runlog.choose(config.run.root, config.run.dir, name_of(config, program))


def name_of(config: SubmitConfig, program: Any) -> str:
    return program.name if isinstance(program, TrainConfig) else Path(config.program).stem


def make(
    config: SubmitConfig,
    launcher: AnyLauncher,
    program: Any,
    words: list[str],
    folder: Path,
    run_dir: Path,
    token: str,
) -> Job:
    """The job. Raises ConfigError where hosts, ranks and the program's mesh do not fit each other."""
    nodes, ranks_per_node = shape(config, launcher, world_of(program))
    far = launcher.layout(folder, run_dir, config.code_dir or _checkout(), config.container)
    if program is not None and words:
        raise ConfigError(
            f"-- {words[0]}: program={config.program} takes key=value arguments. Leave out what follows --."
        )
    script = config.program if far.directory is None else str(Path(config.program).absolute())
    own_command = ("-m", MODULES.get(config.program, ""), "--config", far.config_path)
    min_nodes = config.min_nodes or nodes
    if min_nodes > nodes:
        raise ConfigError(f"min_nodes={min_nodes}: is more than nodes={nodes}. Set min_nodes={nodes} or less.")
    program = _elastic(program, min_nodes, nodes, ranks_per_node)
    own_restarts = program.ranks.max_restarts if isinstance(program, TrainConfig) else 0
    return Job(
        name=name_of(config, program),
        command=(script, *words) if program is None else own_command,
        folder=far.folder,
        run_dir=far.run_dir,
        directory=far.directory,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        min_nodes=min_nodes,
        max_restarts=own_restarts if config.max_restarts is None else config.max_restarts,
        token=token,
        port=config.port or 20000 + int(token, 16) % 10000,
        cpu=_device_of(program) == "cpu" if config.cpu is None else config.cpu,
        python=config.python or far.python,
        config="" if program is None else resolved(program, far.run_dir),
        config_path="" if program is None else far.config_path,
        config_source=f"{folder}/config.yaml",
        env=config.env,
        interface=config.interface,
        container=config.container,
        setup=config.setup,
        code=config.code,
        code_dir=far.code_dir,
    )


def _elastic(program: Any, min_nodes: int, nodes: int, ranks_per_node: int) -> Any:
    """The program's config with ranks.elastic where hosts may come and go. Raises ConfigError for numbers of hosts on
    which it could not run."""
    if min_nodes == nodes or not isinstance(program, TrainConfig):
        return program
    sizes, count = program.mesh.sizes(), min_nodes
    try:
        for count in range(min_nodes, nodes):
            remesh.derive(sizes, count * ranks_per_node, program.batch_size, program.microbatches)
    except ValueError as error:
        raise ConfigError(f"min_nodes={min_nodes}: on {count} hosts, {error}") from error
    return dataclasses.replace(program, ranks=dataclasses.replace(program.ranks, elastic=True))


def resolved(program: Any, run_dir: str) -> str:
    """The config as the ranks read it: the run folder is chosen, so that every rank and every restart has the same."""
    if isinstance(program, TrainConfig):
        program = dataclasses.replace(program, run=dataclasses.replace(program.run, dir=run_dir))
    return compose.to_yaml(program)


def _device_of(program: Any) -> str | None:
    if isinstance(program, TrainConfig):
        return program.mesh.device
    return program.device if isinstance(program, BenchConfig) else None


def world_of(program: Any) -> int | None:
    """How many ranks the program's config asks for; a script of the user's says nothing."""
    if isinstance(program, TrainConfig):
        return program.mesh.sizes().world
    return program.ranks if isinstance(program, BenchConfig) else None


def shape(config: SubmitConfig, launcher: AnyLauncher, world: int | None) -> tuple[int, int]:
    """(hosts, ranks of each). What is not set follows from the mesh and from what the launcher knows of its hosts."""
    hosts, slots = launcher.hosts_and_slots()
    per_node = config.ranks_per_node or slots
    nodes = config.nodes
    if nodes is None and world is not None and per_node is not None:
        nodes = -(-world // per_node)
        per_node = per_node if config.ranks_per_node or nodes > 1 else world
    nodes = nodes or hosts or 1
    if per_node is None:
        if world is None:
            raise ConfigError(
                f"program={config.program}: how many ranks it takes is not known. Set ranks_per_node=<n>."
            )
        per_node = max(1, world // nodes)
    if world is not None and nodes * per_node != world:
        raise ConfigError(
            f"nodes={nodes} ranks_per_node={per_node}: make {nodes * per_node} ranks, and the config has {world}. "
            f"{_remedy(world, hosts, per_node)}"
        )
    return nodes, per_node


def _remedy(world: int, hosts: int | None, per_node: int) -> str:
    """What would fit: hosts for so many ranks each, or the numbers of hosts that share the ranks evenly."""
    if world % per_node == 0 and world // per_node <= (hosts or world):
        return f"Set nodes={world // per_node}, or another mesh."
    legal = [str(nodes) for nodes in range(1, min(hosts or world, world) + 1) if world % nodes == 0]
    return f"With other ranks_per_node, nodes can be {', '.join(legal)}."


def check_program(program: Any, folder: runlog.RunFolder, local_data: bool) -> None:
    """What can be known to fail before a rank starts. Data that only the hosts have is looked for there."""
    if isinstance(program, TrainConfig):
        from moeweave.launch import train

        if local_data or program.data.path is None:
            train.check(program, folder)
        else:
            prepare.check_model(program.model, program.mesh, program.plan)
    elif isinstance(program, BenchConfig):
        from moeweave.launch.bench import program as bench

        bench.check_ops(program, program.ranks)


def _checkout() -> str | None:
    """The folder of the checkout that this process runs moeweave from; None where it is installed."""
    import moeweave

    root = Path(moeweave.__file__).resolve().parent.parent
    installed = {Path(path).resolve() for path in [*site.getsitepackages(), site.getusersitepackages()]}
    return None if root in installed or re.search(r"(site|dist)-packages$", str(root)) else str(root)
