"""An asynchronous result as a value.

`pending = dispatcher.dispatch_async(...)` starts the exchange; `pending.wait()` returns its result, once and for all.
Work placed between the two, or inside `with pending:`, runs while the rows are on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Pending(Generic[T]):
    """Result of an operation that has been started.

    Args:
        finish: called at the first `wait`, blocks until the operation is complete and returns its result.
        token: the edge of the graph between the start and the result, an empty tensor that `finish` is then given.
            Who schedules other work in between may pass it on through functions of its own (`overlap.hand_over`).
    """

    def __init__(self, finish: Callable[..., T], token: Tensor | None = None) -> None:
        self._finish: Callable[..., T] | None = finish
        self.token = token
        self._result: T

    @classmethod
    def ready(cls, result: T) -> Pending[T]:
        """A pending whose result is already here."""
        pending = cls(lambda: result)
        pending.wait()
        return pending

    def wait(self) -> T:
        """Block until the operation is complete. Later calls return the same result at once."""
        if self._finish is not None:
            self._result = self._finish() if self.token is None else self._finish(self.token)
            self._finish = self.token = None
        return self._result

    def __enter__(self) -> Pending[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error inside the block the peers may never answer: waiting would hide it behind a hang.
        if kind is None:
            self.wait()
