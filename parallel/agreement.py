"""An error on one rank becomes the same error on every rank, instead of the others waiting in a collective."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete, damaged, or does not fit; raised alike on every rank."""


def everyones(value: Any) -> list[Any]:
    """What each rank passed, in rank order, on every rank. Small picklable values; a collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Runs the body on every rank; when it raises anywhere, all ranks raise the lowest such rank's error.

    The body must hold no collective that a failing rank would skip. Leaving the context is one.
    """
    try:
        yield
    except Exception as error:
        first = _first_error(error)
        if first is not None and first is not error:
            raise first from None
        raise
    agree(None)


def agree(error: Exception | None) -> None:
    """Raises, on all ranks, the error of the lowest rank that has one. A collective."""
    if (first := _first_error(error)) is not None:
        raise first


def _first_error(error: Exception | None) -> Exception | None:
    for at, other in enumerate(everyones(None if error is None else _sendable(error))):
        if other is not None:
            return error if at == rank() else other
    return None


def rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  some exceptions cannot be rebuilt from their arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
