"""Ingredients of the three-stream schedule, and how it runs with some of them left out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

from moeweave.comm.codec import Codec
from moeweave.comm.three_stream_options import ThreeStreamOptions


@dataclass(frozen=True)
class Ingredients:
    """Which are on, wherever rows are gathered.

    Attributes:
        rank_local: router and shared expert run on this rank's tokens, and not on all ranks' gathered ones.
        quantise: rows are quantised before they are sent.
        two_planes: rows and results take push and dma at the same time, and not push alone.
        overlap: exchanges run beside the computation, and not one after the other.
    """

    rank_local: bool = False
    quantise: bool = False
    two_planes: bool = False
    overlap: bool = False

    @property
    def on(self) -> dict[str, bool]:
        """Each ingredient by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        on = [name for name, is_on in self.on.items() if is_on]
        off = [name for name in self.on if name not in on]
        if len(off) == 1:
            return f"all but {off[0]}"
        return "all" if not off else "none" if not on else " + ".join(on)

    def options(self, codec: Codec, push_share: float, num_parts: int, max_tokens: int) -> ThreeStreamOptions:
        """How the schedule runs so: in fixed sizes of `max_tokens`, a sum a token and rank back."""
        share = push_share if self.two_planes else 1.0
        return ThreeStreamOptions("gathered", share, "prereduced", codec, max_tokens, planes="collectives")


@dataclass(frozen=True)
class WindowIngredients(Ingredients):
    """Which are on, where ranks can write into each other's memory.

    Attributes:
        windows: both planes are writes into windows, and not collectives.
    """

    windows: bool = False

    def options(self, codec: Codec, push_share: float, num_parts: int, max_tokens: int) -> ThreeStreamOptions:
        options = super().options(codec, push_share, num_parts, max_tokens)
        return replace(options, planes="windows") if self.windows else options


@dataclass(frozen=True)
class NodeIngredients(Ingredients):
    """Which are on, between nodes.

    Attributes:
        rank_local: as above; without it all ranks' tokens are gathered first, for router and shared expert alone.
        by_node: a token crosses the network once to each node that needs it, and not once for each of its experts.
        two_planes: rows spread inside the node while others cross the network, and not once all have crossed; without
            by_node, rows take push and dma at the same time.
    """

    by_node: bool = False

    def options(self, codec: Codec, push_share: float, num_parts: int, max_tokens: int) -> ThreeStreamOptions:
        if self.by_node:
            parts = num_parts if self.two_planes else 0
            return ThreeStreamOptions("hierarchical", combine="prereduced", codec=codec, num_parts=parts)
        return ThreeStreamOptions("routed", push_share if self.two_planes else 1.0, "exact", codec)


T = TypeVar("T", bound=Ingredients)


def ways(none: T) -> list[T]:
    """None of them, each alone, all but each, all."""
    names = list(none.on)
    every = replace(none, **dict.fromkeys(names, True))
    return [none, *(replace(none, **{n: True}) for n in names), *(replace(every, **{n: False}) for n in names), every]
