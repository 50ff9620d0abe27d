"""The CUDA engine's exchange as operators with gradients.

    dispatch        x_TD -> rows_RD            backward: combine without weights
    combine         rows_RD -> y_TD            backward: gradients of rows and weights, in one dispatch
Opaque to torch.compile, with fake kernels. Without a capacity the number of rows is a dynamic size. What a graph keeps
is never window memory.

Legend: T tokens here, K routes a token, D width, R rows here, W ranks, M tokens of a rank at most, e experts here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeweave.comm.engines_cuda import cuda_engine_named
from moeweave.comm.onesided_cuda import CudaMoves

op = torch.library.custom_op


class CudaSettings(NamedTuple):
    """What both operators are told beside their tensors.

    Attributes:
        engine: its name.
        exact: a row a route comes back, in place of a row a token and rank.
        format, back, scale: of rows, and of their gradients on the way back.
    """

    engine: str
    exact: bool
    format: str = "none"
    back: str = "none"
    scale: str = "token"


@op("moeweave::onesided_cuda_dispatch", mutates_args=())
def cuda_dispatch(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    capacity: int,
    align: int,
    engine: str,
    exact: bool,
    format: str,
    back: str,
    scale: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens and ids -> rows_RD, weights_R, and the fields of `CudaMoves` after ids_TK; capacity -1 asks for it."""
    rows_RD, _, weights_R, moves = cuda_engine_named(engine).dispatch(
        x_TD, ids_TK, weights_TK, format=format, scale=scale, capacity=None if capacity < 0 else capacity, align=align
    )
    return rows_RD, weights_R, moves.sent_TK, moves.route_row, moves.chunks, moves.token, moves.offsets_e


@cuda_dispatch.register_fake
def _(x_TD, ids_TK, weights_TK, capacity, align, engine, *_settings):  # type: ignore[no-untyped-def]
    window = cuda_engine_named(engine).map
    R = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity

    def integers(*shape: int) -> Tensor:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    return (
        x_TD.new_empty(R, x_TD.shape[1]),
        x_TD.new_empty(R, dtype=torch.float32),
        integers(*ids_TK.shape),
        integers(window.size, window.max_tokens, window.top_k),
        integers(window.size, window.num_chunks),
        integers(window.size, window.max_tokens),
        integers(window.num_local),
    )


def save_dispatch(ctx: Any, moves: list[Tensor], settings: CudaSettings) -> None:
    """Keep what `backward_dispatch` needs."""
    ctx.save_for_backward(*moves)
    ctx.settings = settings


def backward_dispatch(ctx: Any, grad_RD: Tensor) -> Tensor:
    """Gradient of the tokens: a combine without weights."""
    engine, exact, _, back, scale = ctx.settings
    return cuda_combine(grad_RD, None, None, list(ctx.saved_tensors), engine, exact, back, "none", scale)


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ids_TK, _, _, _, *settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    save_dispatch(ctx, [ids_TK, *output[2:]], CudaSettings(*settings))


def _backward_dispatch(ctx: Any, grad_RD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (backward_dispatch(ctx, grad_RD), *[None] * 9)


cuda_dispatch.register_autograd(_backward_dispatch, setup_context=_setup_dispatch)


@op("moeweave::onesided_cuda_resend", mutates_args=())
def cuda_resend(
    x_TD: Tensor,
    weights_TK: Tensor,
    moves: list[Tensor],
    capacity: int,
    engine: str,
    exact: bool,
    format: str,
    back: str,
    scale: str,
) -> tuple[Tensor, Tensor]:
    """Other tokens with the same routes -> rows_RD [capacity, D], weights_R."""
    rows_RD, _, weights_R, _ = cuda_engine_named(engine).resend(
        x_TD, weights_TK, CudaMoves(*moves), capacity, format=format, scale=scale
    )
    return rows_RD, weights_R


@cuda_resend.register_fake
def _(x_TD, weights_TK, moves, capacity, *_settings):  # type: ignore[no-untyped-def]
    return x_TD.new_empty(capacity, x_TD.shape[1]), x_TD.new_empty(capacity, dtype=torch.float32)


def _setup_resend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, moves, _, *settings = inputs
    ctx.mark_non_differentiable(output[1])
    save_dispatch(ctx, moves, CudaSettings(*settings))


def _backward_resend(ctx: Any, grad_RD: Tensor, _: Any) -> tuple[Any, ...]:
    return (backward_dispatch(ctx, grad_RD), None, [None] * len(ctx.saved_tensors), *[None] * 6)


cuda_resend.register_autograd(_backward_resend, setup_context=_setup_resend)


@op("moeweave::onesided_cuda_combine", mutates_args=())
def cuda_combine(
    rows_RD: Tensor,
    weights_TK: Tensor | None,
    weights_R: Tensor | None,
    moves: list[Tensor],
    engine: str,
    exact: bool,
    format: str,
    back: str,
    scale: str,
) -> Tensor:
    """rows_RD -> y_TD. `weights_TK` takes the gradient; prereduced sums use `weights_R`, its copies; None are ones."""
    weights = weights_TK if exact else weights_R
    return cuda_engine_named(engine).combine(
        rows_RD, weights, CudaMoves(*moves), exact=exact, format=format, scale=scale
    )


@cuda_combine.register_fake
def _(rows_RD, weights_TK, weights_R, moves, *_settings):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(moves[0].shape[0], rows_RD.shape[1])


@op("moeweave::onesided_cuda_gradients", mutates_args=())
def cuda_gradients(
    grad_TD: Tensor, rows_RD: Tensor, weights_R: Tensor, moves: list[Tensor], engine: str, format: str, scale: str
) -> tuple[Tensor, Tensor]:
    """Of a weighted combine: gradients of rows_RD and, in float32, of weights_TK."""
    return cuda_engine_named(engine).gradients(
        grad_TD, rows_RD, weights_R, CudaMoves(*moves), format=format, scale=scale
    )


@cuda_gradients.register_fake
def _(grad_TD, rows_RD, weights_R, moves, *_settings):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows_RD), grad_TD.new_empty(moves[0].shape, dtype=torch.float32)


def save_combine(
    ctx: Any, rows_RD: Tensor, weights_TK: Tensor | None, weights_R: Tensor | None, moves: list[Tensor],
    settings: CudaSettings,
) -> None:  # fmt: skip
    """Keep what `backward_combine` needs."""
    ctx.settings, ctx.weights_dtype = settings, None if weights_TK is None else weights_TK.dtype
    if weights_R is not None:
        ctx.save_for_backward(rows_RD, weights_R, *moves)


def backward_combine(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of rows_RD and weights_TK. All ranks exchange the weights' gradient, wanted here or not."""
    if ctx.weights_dtype is None:
        raise RuntimeError("a combine without weights is a backward already: it has no gradient. Differentiate once.")
    rows_RD, weights_R, *moves = ctx.saved_tensors
    engine, _, _, back, scale = ctx.settings
    grad_RD, grad_TK = cuda_gradients(grad_TD, rows_RD, weights_R, moves, engine, back, scale)
    return grad_RD, grad_TK.to(ctx.weights_dtype)


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, weights_TK, weights_R, moves, *settings = inputs
    save_combine(ctx, rows_RD, weights_TK, weights_R, moves, CudaSettings(*settings))


def _backward_combine(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
    grads = backward_combine(ctx, grad_TD)
    return (*grads, None, [None] * len(CudaMoves._fields), *[None] * 5)


cuda_combine.register_autograd(_backward_combine, setup_context=_setup_combine)
