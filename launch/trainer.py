"""What one rank does in `moeweave-train`: wrap, resume, step, save, prove.

Every step is a function of the config and of the step's number: its data (sampler), its learning rate (optim) and its
random numbers (seeded anew). So weights, optimizer state and position are all that a checkpoint needs for a resumed
run to continue bit by bit.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import moeweave as mw
from moeweave.launch import (
    agreement,
    data,
    elastic,
    env,
    expert_load,
    heartbeat,
    optim,
    plot,
    prepare,
    progress,
    runlog,
    stopping,
)
from moeweave.launch.compose import to_yaml
from moeweave.launch.resume import checkpoint_to_resume
from moeweave.launch.sampler import Sampler
from moeweave.launch.schema import TrainConfig
from moeweave.parallel.verify import ParityReport, gradient_parity

logger = logging.getLogger("moeweave")

SECONDS_TO_BE_ASKED = 2.0  # in which agents of all hosts have told their ranks to stop


@dataclass(frozen=True)
class Outcome:
    """What the starting process hears of a run. `proof_ok` is None where it was not asked for."""

    folder: str
    first_loss: float
    last_loss: float
    proof_ok: bool | None


@dataclass
class Training:
    """One rank's side of a run."""

    config: TrainConfig
    mesh: mw.Mesh
    plan: mw.Plan
    folder: runlog.RunFolder
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    heart: heartbeat.Heart
    position: int = 0
    steps_done: int = 0
    skips_in_a_row: int = 0


def train(config: TrainConfig, folder: str | None, command: list[str]) -> Outcome:
    """Runs the whole of one rank. `folder` is the run folder, or None for rank 0 to choose one for all.

    A rank that SIGTERM ended does not return: it exits with stopping.EXIT_CODE, for whoever started it to see.
    """
    ranks = env.launched_ranks()
    heart = heartbeat.Heart(env.logs_of_ranks(), ranks.rank if ranks else 0, config.ranks.hang_timeout)
    heart.beat(0, "the start")
    mesh = mw.Mesh(**asdict(config.mesh))
    run_folder = runlog.RunFolder(Path(agreement.from_rank_0(lambda: _choose_folder(config, folder))))
    alone = ranks is None or ranks.restarts == 0
    starts = agreement.from_rank_0_only(lambda: runlog.hold(run_folder, alone=alone))
    checkpoint = agreement.from_rank_0(lambda: checkpoint_to_resume(config, run_folder))
    agreement.from_rank_0(lambda: runlog.record_start(starts, run_folder, command, checkpoint))
    training = _set_up(config, mesh, run_folder, heart)
    if checkpoint is not None:
        _resume(training, checkpoint)
    own = checkpoint is None or run_folder.checkpoints in Path(checkpoint).parents
    first_step = training.steps_done + 1
    since = agreement.from_rank_0(lambda: runlog.first_step(run_folder) if own else first_step)
    metrics = agreement.from_rank_0_only(lambda: runlog.Metrics(run_folder, first_step, since=since))
    changed = agreement.from_rank_0(lambda: runlog.record_config(run_folder, to_yaml(config)))
    reporter = _reporter(config, mesh, first_step)
    try:
        _greet(reporter, training, checkpoint, changed)
        stopped = _steps(training, metrics, reporter)
    finally:
        reporter.close()
    lines = metrics.lines if metrics is not None else []
    if metrics is not None:
        metrics.close()
        plot.draw(lines, run_folder.picture, f"{config.name}: {prepare.describe(training.model)}")
    report = _prove(training) if config.proof and not stopped else None
    if mesh.rank == 0:
        _farewell(training, lines, report)
    if starts is not None:
        starts.close()
    heart.stop()
    dist.destroy_process_group()
    if stopped:
        elastic.leave(stopping.EXIT_CODE)
    losses = [line["loss"] for line in lines if line["loss"] is not None] or [math.nan]
    return Outcome(str(run_folder.path), losses[0], losses[-1], None if report is None else report.ok)


# ---- set-up and resume


def _set_up(config: TrainConfig, mesh: mw.Mesh, folder: runlog.RunFolder, heart: heartbeat.Heart) -> Training:
    _log_to(folder, mesh.rank)
    plan = mw.Plan.from_dict(config.plan)
    if config.model.weights:
        model = mw.from_pretrained(config.model.source, mesh, plan, **config.model.overrides)
    else:
        model = mw.parallelize(prepare.model_builder(config.model, config.seed)(), mesh, plan)
    model.train()
    tokens = data.open_tokens(config.data)
    sampler = Sampler(
        tokens,
        config.data.seq_length,
        config.batch_size,
        config.seed,
        mesh.data_rank,
        mesh.data_size,
        prepare.vocab_size(model),
    )
    return Training(config, mesh, plan, folder, model, optim.make_optimizer(model, config.optim), sampler, heart)


def _choose_folder(config: TrainConfig, folder: str | None) -> str:
    return folder or str(runlog.choose(config.run.root, config.run.dir, config.name).path)


def _resume(training: Training, checkpoint: str) -> None:
    loaded = mw.load(checkpoint, training.model, training.optimizer)
    if not isinstance(loaded.extra, dict) or "sampler" not in loaded.extra:
        raise ValueError(
            f"resume={checkpoint}: holds no position in the data, so moeweave-train did not write it. Name one that it "
            "wrote, or begin from a folder's weights with model=<folder> model.weights=true."
        )
    training.steps_done = loaded.step
    training.position = training.sampler.resume(loaded.extra["sampler"])


# ---- steps


def _steps(training: Training, metrics: runlog.Metrics | None, reporter: progress.Reporter) -> bool:
    """The steps that are left; returns whether SIGTERM ended them before the last, after a checkpoint."""
    config = training.config
    wish = stopping.StopWish(env.logs_of_ranks(), training.mesh.rank)
    while training.steps_done < config.steps:
        line = _step(training)
        if metrics is not None:
            metrics.add(line)
        reporter.step(line)
        every, done = config.checkpoint.every, training.steps_done
        stop = agreement.any_rank(training.mesh, wish.asked)
        if stop or done == config.steps or (every and done % every == 0):
            training.heart.beat(done, "the checkpoint")
            _save(training, metrics)
        if stop:
            break
    stop = agreement.any_rank(training.mesh, wish.asked)  # also while the last checkpoint was saved
    if stop:
        reached = f"step {training.steps_done} of {config.steps}"
        reporter.say(f"stop    SIGTERM: saved after {reached}; resume=auto goes on from there")
        wish.wait(SECONDS_TO_BE_ASKED)
    else:
        wish.end()
    return stop


def _step(training: Training) -> dict[str, Any]:
    """One optimizer step; returns its line of metrics.jsonl."""
    config, started = training.config, time.perf_counter()
    step = training.steps_done + 1
    training.heart.beat(step, "the forward and backward pass")
    _seed_step(config.seed, step, training.mesh.data_rank)
    batch = {name: ids.to(training.mesh.device) for name, ids in training.sampler.batch(training.position).items()}
    rate = optim.learning_rate(step, config.steps, config.optim)
    optim.set_learning_rate(training.optimizer, rate)

    loss = float(mw.forward_backward(training.model, batch, microbatches=config.microbatches))
    norm = float(mw.clip_grad_norm_(training.model, config.optim.clip_norm or math.inf))
    training.heart.beat(step, "the update")
    skipped = agreement.any_rank(training.mesh, not (math.isfinite(loss) and math.isfinite(norm)))
    if skipped:
        _note_skip(training, step, loss, norm)  # raises where the run must end
    else:
        training.skips_in_a_row = 0
        training.optimizer.step()
    training.optimizer.zero_grad()
    if config.optim.router_bias_rate and not skipped:
        mw.update_router_bias(training.model, config.optim.router_bias_rate)

    load = expert_load.of_step(training.model, training.mesh)
    training.steps_done, training.position = step, training.position + config.batch_size
    seconds = time.perf_counter() - started
    num_tokens = config.batch_size * config.data.seq_length
    line: dict[str, Any] = dict(step=step, loss=loss, grad_norm=norm, lr=rate, balance=expert_load.balance(load))
    line |= dict(
        tokens=training.position * config.data.seq_length,
        seconds=round(seconds, 4),
        tokens_per_second=round(num_tokens / seconds, 1),
    )
    if skipped:
        line |= dict(loss=None, grad_norm=None, skipped=True)  # JSON has no NaN
    if load and (step % config.log.load_every == 0 or step == 1):
        line["load"] = load
    return line


def _note_skip(training: Training, step: int, loss: float, norm: float) -> None:
    """Says on every rank that the step is left out. Raises RuntimeError where the config wants the run to end."""
    config = training.config
    training.skips_in_a_row += 1
    found = f"step {step}: loss {loss}, gradient norm {norm}"
    remedy = "Lower optim.lr or raise optim.warmup_steps, and resume from the last checkpoint."
    if config.on_nan == "stop":
        raise RuntimeError(f"{found} on a rank. The run diverged. {remedy} Or set on_nan=skip.")
    if (in_a_row := training.skips_in_a_row) > config.max_skips:
        raise RuntimeError(f"{found}: {in_a_row} such steps in a row, more than max_skips={config.max_skips}. {remedy}")
    logger.warning("%s: left out, %d in a row", found, training.skips_in_a_row)


def _seed_step(seed: int, step: int, data_rank: int) -> None:
    """Dropout and router noise of a step do not depend on the steps before; ranks that share a batch share them."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, data_rank]).generate_state(1, np.uint64)[0] >> 1))


# ---- checkpoints


def _save(training: Training, metrics: runlog.Metrics | None) -> None:
    folder = training.folder.checkpoints
    if metrics is not None:
        metrics.sync()
        plot.draw(metrics.lines, training.folder.picture, training.config.name)
    mw.save(
        folder / f"step-{training.steps_done:08d}",
        training.model,
        training.optimizer,
        step=training.steps_done,
        extra={"sampler": training.sampler.state(training.position)},
        keep_last=training.config.checkpoint.keep,
    )


# ---- proof


def _prove(training: Training) -> ParityReport:
    """One step of a freshly built model on the next batch, against the same model unwrapped in one process."""
    sampler, position = training.sampler, training.position
    training.optimizer.zero_grad()
    report = gradient_parity(
        prepare.model_builder(training.config.model, training.config.seed),
        lambda data_rank: replace(sampler, data_rank=data_rank).batch(position),
        training.mesh,
        training.plan,
    )
    if training.mesh.rank == 0:
        training.folder.proof.write_text(json.dumps(asdict(report) | {"ok": report.ok}, indent=1))
    return report


# ---- words


def _greet(reporter: progress.Reporter, training: Training, checkpoint: str | None, changed: list[str]) -> None:
    config, sampler = training.config, training.sampler
    reporter.say(f"model   {prepare.describe(training.model)}")
    reporter.say(f"mesh    {training.mesh!r}, {training.mesh.world} ranks")
    tokens = sampler.tokens
    reporter.say(f"data    {tokens.source}, {len(tokens):,} tokens in {sampler.num_windows:,} sequences")
    reporter.say(f"folder  {_shown(training.folder.path)}")
    if checkpoint is not None:
        reporter.say(f"resume  step {training.steps_done} of {config.steps}, from {_shown(Path(checkpoint))}")
        for line in changed:
            reporter.say(f"        changed since: {line}")


def _farewell(training: Training, lines: list[dict[str, Any]], report: ParityReport | None) -> None:
    num_steps = len(lines)
    lines = [line for line in lines if line["loss"] is not None]
    if len(lines) < num_steps:
        print(f"skipped {num_steps - len(lines)} of {num_steps} steps, whose loss or gradient was not finite")
    if lines:
        speed = sorted(line["tokens_per_second"] for line in lines)[len(lines) // 2]
        print(f"loss    {lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f} in {len(lines)} steps, {speed:,.0f} tokens/s")
        print(f"curves  {_shown(training.folder.picture)}")
    if report is not None:
        verdict = "passed" if report.ok else "FAILED"
        coded = ", the codec left out" if training.plan.codec != mw.Codec() else ""
        print(
            f"proof   {verdict}: largest relative error {max(report.worst, report.loss_error):.2e} "
            f"(tolerance {report.tolerance:.0e}) over the loss and {len(report.errors)} gradients, "
            f"against the unwrapped model in one process{coded}"
        )
        if not report.ok:
            print(f"        worst: {report.worst_name} {report.worst:.2e}; loss {report.loss_error:.2e}")


def _shown(path: Path) -> str:
    """The path as short as it can be written."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _reporter(config: TrainConfig, mesh: mw.Mesh, first_step: int) -> progress.Reporter:
    if mesh.rank != 0:
        return progress.Silent()
    return progress.make_reporter(config.log.progress, config.name, first_step, config.steps, config.log.every)


def _log_to(folder: runlog.RunFolder, rank: int) -> None:
    """What the library says, its choices for instance, goes to a file of this rank."""
    path = folder.path / "logs" / f"rank{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("moeweave")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
