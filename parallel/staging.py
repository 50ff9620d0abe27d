"""Folders that appear whole or not at all: written beside their place under a hidden name, then renamed.

A save that dies leaves a hidden sibling, which the next save into the same parent removes. Replacing a folder first
moves the old one aside, to `<name>.replaced`, and removes it only when the new one is in place, so at any moment one of
the two is there whole.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

from moeweave.parallel.agreement import CheckpointError, everyones, rank, together

_MARK = ".moeweave-saving."
_DAY = 24 * 3600.0
REPLACED = ".replaced"


def stage(path: Path) -> Path:
    """An empty hidden folder beside `path` to write into, the same on every rank. A collective.

    Raises CheckpointError on all ranks when it cannot be made, or is not on a file system that all ranks share.
    """
    staged = Path(everyones(str(_hidden(path)))[0])
    with together():
        if rank() == 0:
            if path.exists() and not path.is_dir():
                raise CheckpointError(f"{path} is a file; a checkpoint is a folder. Name another path.")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_stale(path.parent)
                staged.mkdir()
            except OSError as error:
                raise CheckpointError(
                    f"{path.parent} cannot be written to: {error}. Name another path, or make room."
                ) from error
    with together():
        if not staged.is_dir():
            raise CheckpointError(
                f"{staged} was made by rank 0 and is not visible from host {socket.gethostname()}. "
                "Save to a file system that all ranks share."
            )
    return staged


def publish(staged: Path, path: Path) -> None:
    """Give the staged folder its name, moving aside what has it. One rank calls this; `settle` follows."""
    for entry in staged.iterdir():
        sync(entry)
    sync(staged)
    aside = path.with_name(path.name + REPLACED)
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    staged.rename(path)
    sync(path.parent)


def settle(path: Path) -> None:
    """Remove what `path` has replaced, once `path` is complete."""
    aside = path.with_name(path.name + REPLACED)
    if aside.exists():
        remove(aside)


def remove(path: Path) -> None:
    """Remove a folder; interrupted, it leaves nothing under the folder's name."""
    hidden = _hidden(path)
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}{_MARK}{socket.gethostname()}.{os.getpid()}")


def remove_stale(parent: Path) -> None:
    """Remove what dead saves left in `parent`. A save of a process that lives, or may live elsewhere, is left alone."""
    for entry in parent.glob(f".*{_MARK}*"):
        host, _, pid = entry.name.rpartition(_MARK)[2].rpartition(".")
        here = host == socket.gethostname() and pid.isdigit()
        if (here and not _lives(int(pid))) or time.time() - entry.stat().st_mtime > _DAY:
            shutil.rmtree(entry, ignore_errors=True)


def _lives(pid: int) -> bool:
    if pid == os.getpid():  # restarted in a container under the number it had: what is there is of its former life
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
