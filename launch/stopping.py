"""SIGTERM as a wish: the rank ends after the step that it is in, once all ranks know, and saves before.

Queues send it before they take a machine away, agents when hosts come or go. A rank inside a collective learns of it
when the collective ends, which it does: the others go on until all have agreed. Only the steps of a run are guarded;
before and after them SIGTERM ends a rank at once.
"""

from __future__ import annotations

import faulthandler
import signal
import threading
from pathlib import Path

from moeweave.launch import failure

EXIT_CODE = 128 + signal.SIGTERM


class StopWish:
    """Whether this rank was asked to stop. `folder`: where its stack is written when it is asked, or None."""

    def __init__(self, folder: Path | None, rank: int):
        self._asked = threading.Event()
        faulthandler.unregister(signal.SIGTERM)
        self._before = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        if folder is not None:
            failure.record_stop(rank, folder)  # which then calls the handler above

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def wait(self, seconds: float) -> None:
        """Gives whoever asked the other ranks time to ask this one too.

        Otherwise its agent, still unaware, would take its end for a failure, and count a restart for it.
        """
        self._asked.wait(seconds)

    def end(self) -> None:
        """From now on SIGTERM ends the process at once, as before."""
        faulthandler.unregister(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._before)
