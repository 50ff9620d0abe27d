"""Combine over one-sided exchange, as operators with gradients (see `onesided_ops`).

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeweave.comm.onesided_ops import (
    Settings,
    onesided_resend,
    onesided_return_rows,
    onesided_return_sums,
    op,
)
from moeweave.comm.transfer import grad_of_weights, pad_rows, sum_routes, wide

BLOCK_BYTES = 1 << 18


@op("moeweave::onesided_combine_sums", mutates_args=())
def onesided_combine_sums(
    rows_RD: Tensor,
    weights_TK: Tensor,
    weights_R: Tensor,
    moves: list[Tensor],
    settings: str,
) -> Tensor:
    """Prereduced combine -> y_TD. `weights_TK` takes the gradient; the numbers used are `weights_R`."""
    return onesided_return_sums(rows_RD, weights_R, moves, *weights_TK.shape, settings)


@onesided_combine_sums.register_fake
def _(rows_RD, weights_TK, *_rest):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


@op("moeweave::row_dots", mutates_args=())
def row_dots(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """sum_d a[r, d] * b[r, d] -> [R]; in blocks, so that the products stay in the cache."""
    step = max(1, BLOCK_BYTES // max(1, a_RD.shape[1] * a_RD.dtype.itemsize))
    out_R = a_RD.new_empty(a_RD.shape[0])
    for a, b, out in zip(a_RD.split(step), b_RD.split(step), out_R.split(step), strict=True):
        torch.sum(a * b, dim=1, out=out)
    return out_R


@row_dots.register_fake
def _(a_RD, b_RD):  # type: ignore[no-untyped-def]
    return a_RD.new_empty(a_RD.shape[0])


def save_sums(
    ctx: Any, rows_RD: Tensor, weights_TK: Tensor, weights_R: Tensor, moves: list[Tensor], settings: Settings
) -> None:
    """Keep what `backward_sums` needs."""
    ctx.settings, ctx.num_moves = settings, len(moves)
    ctx.save_for_backward(rows_RD, weights_TK, weights_R, *moves)


def backward_sums(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of a prereduced combine: of rows_RD and of weights_TK.

    All ranks exchange the weights' gradient, wanted here or not: whether it is may differ between them.
    """
    saved = ctx.saved_tensors  # read once, as checkpointed activations can be
    _, weights_TK, _, *moves = saved
    grad_RD, _ = onesided_resend(grad_TD, weights_TK.detach(), moves, ctx.settings.backward.text)
    return grads_of_sums(saved, ctx.settings, grad_RD)


def grads_of_sums(saved: tuple[Tensor, ...], settings: Settings, grad_RD: Tensor) -> tuple[Tensor, Tensor]:
    """What `backward_sums` returns, from what `save_sums` kept and the tokens' gradients as they came to the rows
    [R, D]."""
    rows_RD, weights_TK, weights_R, *moves = saved
    grad_RD = grad_RD.to(wide(grad_RD.dtype))
    used = rows_RD[: grad_RD.shape[0]].to(grad_RD.dtype)
    dots_R1 = row_dots(grad_RD, used).unsqueeze(1)
    returned = onesided_return_rows(dots_R1, moves, *weights_TK.shape, settings.backward.uncoded.text)
    grad_rows = (grad_RD * weights_R.unsqueeze(1).to(grad_RD.dtype)).to(rows_RD.dtype)
    return pad_rows(grad_rows, rows_RD.shape[0]), returned.squeeze(2).to(weights_TK.dtype)


def _setup_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, weights_TK, weights_R, moves, settings = inputs
    save_sums(ctx, rows_RD, weights_TK, weights_R, moves, Settings.of(settings))


def _backward_sums(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
    grad_rows, grad_weights = backward_sums(ctx, grad_TD)
    return grad_rows, grad_weights, None, [None] * ctx.num_moves, None


onesided_combine_sums.register_autograd(_backward_sums, setup_context=_setup_sums)


@op("moeweave::onesided_combine_rows", mutates_args=())
def onesided_combine_rows(
    rows_RD: Tensor,
    weights_TK: Tensor,
    moves: list[Tensor],
    settings: str,
) -> tuple[Tensor, Tensor]:
    """Exact combine -> y_TD, and the returned routes [T, K, D]."""
    routes_TKD = onesided_return_rows(rows_RD, moves, *weights_TK.shape, settings)
    return sum_routes(routes_TKD, weights_TK), routes_TKD


@onesided_combine_rows.register_fake
def _(rows_RD, weights_TK, *_rest):  # type: ignore[no-untyped-def]
    width = rows_RD.shape[1]
    return rows_RD.new_empty(weights_TK.shape[0], width), rows_RD.new_empty(*weights_TK.shape, width)


def save_rows(
    ctx: Any, rows_RD: Tensor, weights_TK: Tensor, routes_TKD: Tensor, moves: list[Tensor], settings: Settings
) -> None:
    """Keep what `backward_rows` needs; the returned routes only if the weights want a gradient."""
    ctx.settings, ctx.num_rows, ctx.num_moves = settings, rows_RD.shape[0], len(moves)
    ctx.save_for_backward(weights_TK, *moves, *([routes_TKD] if weights_TK.requires_grad else []))


def backward_rows(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradient of an exact combine: of rows_RD, and of weights_TK if it was wanted."""
    weights_TK, *rest = ctx.saved_tensors
    moves, returned = rest[: ctx.num_moves], rest[ctx.num_moves :]
    grad_RD, weights_R = onesided_resend(grad_TD, weights_TK.detach(), moves, ctx.settings.backward.text)
    grad_weights = grad_of_weights(grad_TD, returned[0], weights_TK.dtype) if returned else None
    return weighted_grad(grad_RD, weights_R, ctx.num_rows), grad_weights


def weighted_grad(grad_RD: Tensor, weights_R: Tensor, num_rows: int) -> Tensor:
    """Gradient of the experts' rows, of which there are `num_rows`, from their tokens' gradients."""
    weighted = grad_RD * weights_R.unsqueeze(1).to(wide(grad_RD.dtype))
    return pad_rows(weighted.to(grad_RD.dtype), num_rows)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows_RD, weights_TK, moves, settings = inputs
    ctx.mark_non_differentiable(output[1])
    save_rows(ctx, rows_RD, weights_TK, output[1], moves, Settings.of(settings))


def _backward_rows(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*backward_rows(ctx, grad_TD), [None] * ctx.num_moves, None)


onesided_combine_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
