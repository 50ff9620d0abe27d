"""Programs with a fault put in, for the tests that they notice."""

import os
import signal

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
