"""`moeweave-train`: trains a mixture-of-experts model over ranks that it starts itself, or that torchrun started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from moeweave.launch import cli, elastic, env, prepare, remesh, runlog
from moeweave.launch.schema import ConfigError, TrainConfig

PROGRAM = cli.Program(
    name="moeweave-train",
    config="train",
    summary="Trains a Hugging Face mixture-of-experts model over ranks, from YAML groups and key=value arguments.",
    examples=(
        ("moeweave-train experiment=quickstart", "two CPU ranks, a small Qwen3-MoE, English text, about a minute"),
        (
            "moeweave-train experiment=quickstart data.path=book.txt steps=500 run.dir=runs/book",
            "own text (.txt, .jsonl, .npy, .bin); the same command again resumes the run",
        ),
        ("moeweave-train model=mixtral mesh.dp=2 mesh.ep=2 mesh.device=cpu", "a tiny Mixtral on two ranks"),
        ("moeweave-train model=path/to/folder model.weights=true mesh.dp=8 mesh.ep=8", "go on from a folder's weights"),
        ("torchrun --nproc-per-node 2 -m moeweave.launch.train experiment=quickstart", "use the ranks of torchrun"),
    ),
    schema=TrainConfig,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(PROGRAM, cli.starting(PROGRAM, start), argv)


def start(config: TrainConfig) -> int:
    """Runs a checked config, on ranks of its own or on those that a launcher started; returns the exit code."""
    folder = runlog.choose(config.run.root, config.run.dir, config.name)
    ranks = env.launched_ranks()
    if ranks is not None:
        config = fitted(config, ranks.world) if config.ranks.elastic else config
        config.mesh.sizes().check_world(ranks.world)
    check(config, folder)

    from moeweave.launch.trainer import train

    command = cli.shown_command(PROGRAM)
    if ranks is not None:
        outcome = record(train)(config, config.run.dir and str(folder.path), command)
        assert outcome is not None, "record returns what train returns, or raises"
    else:
        num_ranks = config.mesh.sizes().world
        elastic.check_device("mesh.device", config.mesh.device, num_ranks)
        outcome = elastic.start_ranks(
            train,
            config,
            str(folder.path),
            command,
            num_ranks=num_ranks,
            log_dir=folder.logs(),
            max_restarts=config.ranks.max_restarts,
            on_cpu=config.mesh.device == "cpu" or not elastic.has_accelerator(),
        )
    code = 1 if outcome.proof_ok is False else 0
    if ranks is not None:
        elastic.leave(code)
    return code


def fitted(config: TrainConfig, world: int) -> TrainConfig:
    """The config with its mesh made one of `world` ranks. Raises ValueError where that cannot be."""
    sizes = remesh.derive(config.mesh.sizes(), world, config.batch_size, config.microbatches)
    return replace(config, mesh=replace(config.mesh, **asdict(sizes)))


def check(config: TrainConfig, folder: runlog.RunFolder) -> None:
    """Everything that can be known to fail before a rank starts. Raises ValueError."""
    model = prepare.check_model(config.model, config.mesh, config.plan)
    prepare.check_microbatches(config.microbatches, config.mesh, config.plan)
    prepare.check_data(config.data, model)
    ranks = env.launched_ranks()
    restarted = ranks is not None and ranks.restarts > 0
    if restarted and config.run.dir is None:
        raise ConfigError("run.dir=null: ranks that are started again must find their run. Set run.dir=<folder>.")
    folder.check_own()
    if ranks is None:
        runlog.check_free(folder)
    if config.resume == "never" and folder.holds_a_run() and not restarted:
        raise ConfigError(
            f"run.dir={folder.path}: holds a run, and resume=never would overwrite it. "
            "Use resume=auto, or another folder."
        )
    if config.resume not in ("auto", "never") and not Path(config.resume).expanduser().is_dir():
        raise ConfigError(f"resume={config.resume}: no such folder. Use auto, never, or a checkpoint folder's path.")


if __name__ == "__main__":
    sys.exit(main())
