"""What is measured: one operation on one size over one backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeweave.launch.schema import ConfigError


@dataclass(frozen=True)
class Work:
    """Something that can be run and checked.

    Attributes:
        run: does it once, without waiting for the device.
        reset: overwrites the result, so that `off` counts what the next `run` leaves undone.
        off: how many elements of the result are not as they must be.
    """

    run: Callable[[], object]
    reset: Callable[[], object]
    off: Callable[[], int]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        op, backend: names. size: bytes of the whole array. count: elements, as nccl-tests print them. dtype, redop:
            words.
        work: what is run and checked.
        in_place: whether the result takes the place of the input.
        factor: bus bandwidth over algorithm bandwidth (nccl-tests, PERFORMANCE.md); 1 for MoE operations.
        logical_bytes: MoE operations: what must leave this rank, each token once to each remote rank that it needs.
        wire_bytes: MoE operations: what this backend sends from this rank to others; None where it does not say.
        network_bytes: that part of `wire_bytes` which goes to other hosts.
        label: a shape's name, or the pair of ranks.
        graph: whether it can be captured in a CUDA graph, that is, waits nowhere for the host.
        facts: what else goes into the line, asked for once it was timed.
        sides: operations that run several things at once: microseconds that each took in the last run, by its name.
    """

    op: str
    backend: str
    size: int
    count: int
    dtype: str
    work: Work
    factor: float = 1.0
    redop: str = "none"
    in_place: bool = False
    logical_bytes: int | None = None
    wire_bytes: int | None = None
    network_bytes: int | None = None
    label: str = ""
    graph: bool = True
    sides: Callable[[], dict[str, float]] | None = None
    facts: Callable[[], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        place = " in place" if self.in_place else ""
        return f"{self.op} {self.backend} {self.label or self.size}{place}"


def backend_factory(name: str, known: Mapping[str, Callable[..., Any]], op: str) -> Callable[..., Any]:
    """The factory of a backend: a known name, or `module:factory` of the user's own. Raises ConfigError."""
    if name in known:
        return known[name]
    module, _, factory = name.partition(":")
    if not factory:
        raise ConfigError(f"backend={name}: must be one of {', '.join(known)} with op={op}, or module:factory.")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backend={name}: {error}. Name an importable module and a function in it.") from error
    return found
