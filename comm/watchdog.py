"""Raises what a kernel reported where nobody asks: a program that only replays CUDA graphs makes no call that could.

A thread reads the flag in pinned memory that a failing kernel sets. The error is raised in the thread that made the
engine, at its next step of Python: one that waits for the device gets it when the failed kernels have ended, within the
deadline.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
import weakref
from typing import Protocol

logger = logging.getLogger("moeweave")

POLL = 0.1  # seconds between two looks
GRACE = 1.0  # seconds that the next call has to raise it itself


class Watched(Protocol):
    """Something that reports an error.

    Attributes:
        told: whether somebody has raised the error already.
    """

    told: bool

    def error(self) -> RuntimeError | None:
        """The error, once it was reported."""


def watch(watched: Watched, *, poll: float = POLL, grace: float = GRACE) -> threading.Thread:
    """Start a thread that raises the error of `watched` in the calling thread; it ends with `watched`."""
    arguments = (weakref.ref(watched), threading.get_ident(), poll, grace)
    thread = threading.Thread(target=_watch, args=arguments, name="moeweave-watchdog", daemon=True)
    thread.start()
    return thread


def _watch(reference: weakref.ref[Watched], caller: int, poll: float, grace: float) -> None:
    while (watched := reference()) is not None:
        error = watched.error()
        if error is None:
            del watched
            time.sleep(poll)
            continue
        time.sleep(grace)
        if not watched.told:
            watched.told = True
            logger.error("%s", error)
            _raise_in(caller, error)
        return


def _raise_in(thread: int, error: RuntimeError) -> None:
    """Python raises a class in another thread, not an object: one that makes itself with the error's text."""
    kind, text = type(error), str(error)

    def init(self: RuntimeError) -> None:
        kind.__init__(self, text)

    made = type(kind.__name__, (kind,), {"__init__": init})
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(made))
