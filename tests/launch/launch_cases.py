"""Programs with a fault put in, for the tests that they notice."""

import itertools
import math
import os
import signal
import time

from moeweave.launch import env, train, trainer, verify
from moeweave.parallel import verify as proof


def main(argv):
    program, fault, *rest = argv
    globals()[fault]()
    return {"train": train.main, "verify": verify.main}[program](rest)


def scale_one_gradient():
    """One gradient of the wrapped model comes out a thousandth too large."""
    honest = proof.forward_backward

    def dishonest(model, batch, *options):
        loss = honest(model, batch, *options)
        dict(model.named_parameters())["model.layers.1.self_attn.q_proj.weight"].grad.mul_(1.001)
        return loss

    proof.forward_backward = dishonest


def lose_a_rank_once():
    """Rank 1 is killed in its fifth step, at the first attempt."""
    honest = trainer._step

    def step(training):
        ranks = env.launched_ranks()
        if training.steps_done == 4 and ranks.rank == 1 and ranks.restarts == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(training)

    trainer._step = step


def sleep_once():
    """Rank 1 sleeps in its third step, at the first attempt."""
    _in_step(lambda: time.sleep(600), step=3)


def freeze_once():
    """Rank 1 is stopped in its third step, as by a debugger, at the first attempt."""
    _in_step(lambda: os.kill(os.getpid(), signal.SIGSTOP), step=3)


def _in_step(fault, step):
    honest = trainer._step

    def faulty(training):
        ranks = env.launched_ranks()
        if training.steps_done == step - 1 and ranks.rank == 1 and ranks.restarts == 0:
            fault()
        return honest(training)

    trainer._step = faulty


def nan_on_one_rank():
    """Rank 1 alone finds a loss that is no number in the steps 3 and 4."""
    honest = trainer.mw.forward_backward
    calls = itertools.count(1)

    def faulty(*arguments, **options):
        loss = honest(*arguments, **options)
        return loss * math.nan if next(calls) in (3, 4) and env.launched_ranks().rank == 1 else loss

    trainer.mw.forward_backward = faulty


def stop_in_the_last_save():
    """SIGTERM reaches the launcher, and from there all ranks, while the last checkpoint is saved."""
    honest = trainer._save

    def asked(training, metrics):
        if training.steps_done == training.config.steps:
            if training.mesh.rank == 0:
                os.kill(os.getppid(), signal.SIGTERM)
            stack = env.logs_of_ranks() / f"rank{training.mesh.rank}.stopped.txt"
            while stack.stat().st_size == 0:
                time.sleep(0.01)
        honest(training, metrics)

    trainer._save = asked


def slow_steps():
    """Every step takes a third of a second longer."""
    honest = trainer._step

    def slow(training):
        time.sleep(0.33)
        return honest(training)

    trainer._step = slow
