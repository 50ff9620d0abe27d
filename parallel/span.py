"""The sequences of a forward pass, as ranks share them out: who holds which positions of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeweave.parallel.adapter import UnsupportedModel
from moeweave.parallel.shards import Shards, join, take_whole


@dataclass(frozen=True)
class Span:
    """One forward pass between the first layer and the last.

    Attributes:
        rows: B, sequences of the batch.
        sp: how the `sp` ranks share out the positions; of one rank, all of them.
        tp: how the `tp` ranks share out the positions of an sp shard, under tp_sequence; None if each has all.
        joined: the hidden states behind the last layer are made whole again; if not, the loss is computed on shards.
        whole: arguments of layers before they were cut, by name.
    """

    rows: int
    sp: Shards
    tp: Shards | None
    joined: bool
    whole: dict[str, Tensor] = field(default_factory=dict)

    def enter(self, hidden: Tensor) -> Tensor:
        """[B, S, D] in front of the first layer -> what this rank computes of it."""
        if self.sp.comm.size > 1:
            hidden = self.sp.take(hidden, 1)
        return hidden if self.tp is None else take_whole(hidden, self.tp, 1)

    def leave(self, hidden: Tensor) -> Tensor:
        """The reverse, behind the last layer; only over `tp` unless `joined`.

        Every sp rank then computes the whole loss, and gradients are averaged over them: hence the factor.
        """
        if self.tp is not None:
            hidden = join(hidden, self.tp, 1)
        if self.joined and self.sp.comm.size > 1:
            hidden = join(hidden, self.sp, 1, factor=self.sp.comm.size)
        return hidden

    def argument(self, layer: str, name: str, value: Any) -> Any:
        """An argument of a layer, cut to the positions that attention computes on: real or complex [..., S, D] and
        integers [..., S]. Masks stay whole.

        Raises:
            UnsupportedModel: under tp_sequence, a value a token that is not attention's.
        """
        if "mask" in name:
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self.argument(layer, name, each) for each in value)
        if not isinstance(value, Tensor):
            return value
        dim = -2 if value.is_floating_point() or value.is_complex() else -1
        if value.dim() < -dim or value.shape[dim] != self.sp.length:
            return value
        per_row = value.dim() > -dim and value.shape[0] == self.rows > 1
        if self.tp is not None and per_row and "position" not in name:
            raise UnsupportedModel(
                f"{layer} takes {name} {tuple(value.shape)}, and Plan(tp_sequence=True) cannot tell whether attention "
                "or the tokens of a shard need it. Use Plan(tp_sequence=False)."
            )
        self.whole[name] = value
        return self.sp.take(value, dim) if self.sp.comm.size > 1 else value

    @property
    def held(self) -> int:
        """Positions of a sequence whose tokens this rank routes."""
        return self.sp.held if self.tp is None else self.tp.held

    def tokens(self, per_token: Tensor) -> Tensor:
        """[B, S] -> of the tokens that this rank routes."""
        mine = self.sp.take(per_token, 1)
        return mine if self.tp is None else self.tp.take(mine, 1)


_current: ContextVar[Span | None] = ContextVar("moeweave_span", default=None)


def current_span() -> Span | None:
    """The forward pass under way, or being recomputed; None where every rank computes whole sequences."""
    return _current.get()


@contextmanager
def spanning(span: Span | None) -> Iterator[None]:
    """`current_span` is `span` inside."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)
