"""One-sided exchange as operators with gradients.

    dispatch        engine.dispatch          x_TD -> rows_RD
      backward      engine.return_sums without weights ("prereduced"), or return_rows summed over k ("exact")
    combine         engine.return_sums       rows_RD -> y_TD                  ("prereduced")
      backward      engine.resend, times the weights; the weights' gradient goes back by return_rows of width one
    combine         engine.return_rows, weighted sum over k                   ("exact")
      backward      engine.resend, times the weights; the weights' gradient from the returned rows

"exact" gives the bits of the all-to-all dispatcher, forward and backward. What a graph keeps is never window memory.
The operators are opaque to torch.compile and carry fake kernels: received row counts are dynamic sizes.

Legend: T tokens here, K routes a token, D width, R rows here, e experts of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeweave.comm.engines import engine_named
from moeweave.comm.onesided import Wire
from moeweave.comm.transfer import sum_routes

op = torch.library.custom_op


class Settings(NamedTuple):
    """What every operator is told beside its tensors.

    Attributes:
        engine: its name.
        exact: a row a route comes back, in place of a row a token and rank.
        max_tokens: fixed room for tokens of a rank, 0 where it grows.
        format, back, scale: of rows, and of their gradients on the way back.
    """

    engine: str
    exact: bool
    max_tokens: int = 0
    format: str = "none"
    back: str = "none"
    scale: str = "token"

    @classmethod
    def of(cls, text: str) -> Settings:
        """The way back of `text`."""
        engine, exact, max_tokens, *formats = text.rsplit("|", 5)
        return cls(engine, exact == "True", int(max_tokens), *formats)

    @property
    def text(self) -> str:
        """As operators take it: one argument for all."""
        return "|".join(map(str, self))

    @property
    def wire(self) -> Wire:
        return Wire(self.format, self.scale, self.max_tokens)

    @property
    def backward(self) -> Settings:
        """Of the operators that carry the gradient."""
        return self._replace(format=self.back, back="none")

    @property
    def uncoded(self) -> Settings:
        return self._replace(format="none", back="none", scale="token")


@op("moeweave::onesided_dispatch", mutates_args=())
def onesided_dispatch(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Tokens [T, D] and ids -> rows_RD, weights_R, offsets_e and `Moves`."""
    way = Settings.of(settings)
    posted = engine_named(way.engine).dispatch(x_TD, ids_TK, weights_TK, num_experts, way.wire)
    rows_RD, weights_R, offsets_e, moves = posted.wait()
    return rows_RD, weights_R, offsets_e, moves.tensors


@onesided_dispatch.register_fake
def _(x_TD, ids_TK, weights_TK, num_experts, settings):  # type: ignore[no-untyped-def]
    made = engine_named(Settings.of(settings).engine)
    tensors = made.fake_moves(ids_TK, torch.library.get_ctx().new_dynamic_size)
    num_rows = made.moves(tensors).perm_R.shape[0]
    return (
        x_TD.new_empty(num_rows, x_TD.shape[1]),
        weights_TK.new_empty(num_rows),
        ids_TK.new_empty(num_experts // made.size, dtype=torch.int32),
        tensors,
    )


def save_dispatch(ctx: Any, x_TD: Tensor, top_k: int, moves: list[Tensor], settings: Settings) -> None:
    """Keep what `backward_dispatch` needs."""
    ctx.save_for_backward(*moves)
    ctx.num_tokens, ctx.top_k, ctx.settings = x_TD.shape[0], top_k, settings


def backward_dispatch(ctx: Any, grad_RD: Tensor) -> Tensor:
    """Gradient of the tokens: a combine without weights."""
    way, settings = (list(ctx.saved_tensors), ctx.num_tokens, ctx.top_k), ctx.settings.backward
    if settings.exact:
        return sum_routes(onesided_return_rows(grad_RD, *way, settings.text), None)
    return onesided_return_sums(grad_RD, None, *way, settings.text)


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x_TD, ids_TK, _, _, settings = inputs
    _, weights_R, offsets_e, moves = output
    ctx.mark_non_differentiable(weights_R, offsets_e, *moves)
    save_dispatch(ctx, x_TD, ids_TK.shape[1], moves, Settings.of(settings))


def _backward_dispatch(ctx: Any, grad_RD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (backward_dispatch(ctx, grad_RD), *[None] * 4)


onesided_dispatch.register_autograd(_backward_dispatch, setup_context=_setup_dispatch)


@op("moeweave::onesided_resend", mutates_args=())
def onesided_resend(
    x_TD: Tensor,
    weights_TK: Tensor,
    moves: list[Tensor],
    settings: str,
) -> tuple[Tensor, Tensor]:
    """Other tokens with the same routes -> rows_RD, weights_R."""
    way = Settings.of(settings)
    made = engine_named(way.engine)
    return made.resend(x_TD, weights_TK, made.moves(moves), way.wire).wait()


@onesided_resend.register_fake
def _(x_TD, weights_TK, moves, settings):  # type: ignore[no-untyped-def]
    num_rows = engine_named(Settings.of(settings).engine).moves(moves).perm_R.shape[0]
    return x_TD.new_empty(num_rows, x_TD.shape[1]), weights_TK.new_empty(num_rows)


def _setup_resend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, weights_TK, moves, settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.num_moves = len(moves)
    save_dispatch(ctx, x_TD, weights_TK.shape[1], moves, Settings.of(settings))


def _backward_resend(ctx: Any, grad_RD: Tensor, _: Any) -> tuple[Any, ...]:
    return backward_dispatch(ctx, grad_RD), None, [None] * ctx.num_moves, None


onesided_resend.register_autograd(_backward_resend, setup_context=_setup_resend)


@op("moeweave::onesided_return_sums", mutates_args=())
def onesided_return_sums(
    rows_RD: Tensor,
    weights_R: Tensor | None,
    moves: list[Tensor],
    num_tokens: int,
    top_k: int,
    settings: str,
) -> Tensor:
    """rows_RD -> [T, D], summed on the experts' ranks and then over ranks; `None` weights are ones."""
    way = Settings.of(settings)
    made = engine_named(way.engine)
    return made.return_sums(rows_RD, weights_R, made.moves(moves), num_tokens, top_k, way.wire).wait()


@onesided_return_sums.register_fake
def _(rows_RD, weights_R, moves, num_tokens, top_k, settings):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(num_tokens, rows_RD.shape[1])


@op("moeweave::onesided_return_rows", mutates_args=())
def onesided_return_rows(
    rows_RD: Tensor,
    moves: list[Tensor],
    num_tokens: int,
    top_k: int,
    settings: str,
) -> Tensor:
    """rows_RD -> [T, K, D] on the tokens' ranks, zeros where not routed."""
    way = Settings.of(settings)
    made = engine_named(way.engine)
    return made.return_rows(rows_RD, made.moves(moves), num_tokens, top_k, way.wire).wait()


@onesided_return_rows.register_fake
def _(rows_RD, moves, num_tokens, top_k, settings):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(num_tokens, top_k, rows_RD.shape[1])
