"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

import moeweave as mw
from moeweave.launch import env, runlog
from moeweave.launch.schema import TrainConfig


def checkpoint_to_resume(config: TrainConfig, folder: runlog.RunFolder) -> str | None:
    """The checkpoint to go on from, or None to begin. Ranks that were restarted go on from their own newest."""
    own = mw.latest(folder.checkpoints)
    ranks = env.launched_ranks()
    restarted = ranks is not None and ranks.restarts > 0
    if config.resume == "auto" or (restarted and own is not None):
        return None if own is None else str(own)
    if config.resume == "never":
        return None
    named = Path(config.resume).expanduser().absolute()
    if runlog.RunFolder(named).checkpoints.is_dir():
        named = mw.latest(runlog.RunFolder(named).checkpoints) or named
    if own is not None and named.resolve() != own.resolve():
        held = "a newer checkpoint" if named.parent == folder.checkpoints else "a checkpoint of its own"
        raise ValueError(
            f"resume={named}: run.dir holds {held}, {own.name}, that this run would leave behind. "
            "Use resume=auto, or begin a branch with run.dir=<new folder>."
        )
    return str(named)
