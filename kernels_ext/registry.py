"""Who can run an op on these tensors, and why the others cannot.

An op is a tuple of implementations, best first. Each is any object (usually a module) with a `name` and
`supports(*tensors) -> str | None`: None if it can run, else the reason why not.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

logger = logging.getLogger("moeweave")


class Implementation(Protocol):
    """What the registry needs to know of an implementation; an op's own protocol adds the functions."""

    @property
    def name(self) -> str: ...

    def supports(self, *tensors: Tensor) -> str | None: ...


I = TypeVar("I", bound=Implementation)  # noqa: E741


@dataclass(frozen=True)
class Op(Generic[I]):
    """A named op and its implementations, best first."""

    name: str
    implementations: Sequence[I]


def select(op: Op[I], *tensors: Tensor, impl: str = "auto") -> I:
    """Return the implementation of `op` that runs on `tensors`.

    impl="auto" takes the first that supports them, and logs once when better ones were passed over. A named one that
    cannot run, or that does not exist, raises ValueError with the reason and the list.
    """
    reasons: list[tuple[str, str]] = []
    for candidate in op.implementations:
        if impl not in ("auto", candidate.name):
            continue
        reason = candidate.supports(*tensors)
        if reason is None:
            if reasons:
                _log_once(op.name, candidate.name, tuple(reasons))
            return candidate
        reasons.append((candidate.name, reason))
    names = ", ".join(candidate.name for candidate in op.implementations)
    if not reasons:
        raise ValueError(f"impl={impl!r} is no implementation of {op.name}. Use one of: auto, {names}.")
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    raise ValueError(f"impl={impl!r} cannot run {op.name} on these tensors ({why}). Use one of: auto, {names}.")


@functools.cache
def _log_once(op: str, chosen: str, passed_over: tuple[tuple[str, str], ...]) -> None:
    why = "; ".join(f"not {name}: {reason}" for name, reason in passed_over)
    logger.info("%s runs on %r (%s)", op, chosen, why)
