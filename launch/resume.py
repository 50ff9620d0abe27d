"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

import moeweave as mw
from moeweave.launch import env, runlog
from moeweave.launch.schema import TrainConfig


def checkpoint_to_resume(config: TrainConfig, folder: runlog.RunFolder) -> str | None:
    """The checkpoint to go on from, or None to begin. Ranks that were restarted go on from their own newest, and so
    does a run that began from the checkpoint that is named. Raises ValueError where that would leave work behind."""
    own = mw.latest(folder.checkpoints)
    ranks = env.launched_ranks()
    restarted = ranks is not None and ranks.restarts > 0
    if config.resume == "auto" or (restarted and own is not None):
        return None if own is None else str(own)
    if config.resume == "never":
        return None
    asked = Path(config.resume).expanduser().absolute()
    another = runlog.RunFolder(asked).checkpoints
    named = (mw.latest(another) or asked) if another.is_dir() else asked
    if own is not None and _began_from(folder, named, another):
        return str(own)
    if own is not None and named.resolve() != own.resolve():
        held = "a newer checkpoint" if named.parent == folder.checkpoints else "a checkpoint of its own"
        raise ValueError(
            f"resume={named}: run.dir holds {held}, {own.name}, that this run would leave behind. "
            "Use resume=auto, or begin a branch with run.dir=<new folder>."
        )
    return str(named)


def _began_from(folder: runlog.RunFolder, checkpoint: Path, checkpoints: Path) -> bool:
    """Whether the run in `folder` began from that checkpoint of another, or from one that lay beside it."""
    origin = runlog.origin(folder)
    return origin is not None and (origin == checkpoint.resolve() or origin.parent == checkpoints.resolve())
