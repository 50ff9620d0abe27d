"""Rows that every rank gathers: the custom operators of dispatch by all-gather, with their gradients.

    dispatch        gather_rows                           x_TD -> rows_RD
      backward      return_routes, sum over k             a combine without weights
    combine         weighted sum on the expert's rank, reduce-scatter            ("prereduced")
      backward      gather_rows times the weights         the same, by all-gather

The exact combine is that of `transfer`, and so is what is said there of formats and of torch.compile.

Legend: T tokens here, K routes a token, R rows here, D width of a row, W ranks, M = T_max of the group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeweave.comm.codec import decode_rows, encode_rows
from moeweave.comm.communicator import Communicator
from moeweave.comm.transfer import from_words, op, pad_rows, register_dispatch, return_routes, to_words, wide


@op("moeweave::gather_rows", mutates_args=())
def gather_rows(
    x_TD: Tensor,
    route_R: Tensor,
    max_tokens: Tensor,
    order_N: Tensor,
    send_splits: Tensor,
    recv_splits: Tensor,
    perm_R: Tensor,
    top_k: int,
    group: str,
    format: str = "none",
    back: str = "none",
    scale: str = "token",
) -> Tensor:
    """Every rank's rows [T, D] to every rank; those that this rank's experts need -> rows_RD by expert.

    The layout's moves are only for the gradient, which goes back a row a route as after `send_routes`.
    """
    comm = Communicator.named(group)
    words = to_words(x_TD, format, scale)
    num_padding = int(max_tokens) - x_TD.shape[0]
    padded = torch.nn.functional.pad(words, (0, 0, 0, num_padding)) if num_padding else words
    rows_ND = from_words(comm.all_gather(padded).flatten(0, 1), format, scale, x_TD.shape[1], x_TD.dtype)
    return rows_ND.index_select(0, route_R // top_k)


@gather_rows.register_fake
def _(x_TD, route_R, *_settings):  # type: ignore[no-untyped-def]
    return x_TD.new_empty(route_R.shape[0], x_TD.shape[1])


register_dispatch(gather_rows, 3)


@op("moeweave::combine_prereduced", mutates_args=())
def combine_prereduced(
    rows_RD: Tensor,
    weights_TK: Tensor,
    weights_R: Tensor,
    route_R: Tensor,
    max_tokens: Tensor,
    order_N: Tensor,
    send_splits: Tensor,
    recv_splits: Tensor,
    perm_R: Tensor,
    group: str,
    format: str = "none",
    back: str = "none",
    scale: str = "token",
) -> Tensor:
    """Weighted sum over this rank's experts, one row a token and rank back, summed over ranks -> y_TD.

    `weights_TK` takes the gradient; the numbers used are `weights_R`, its copies on the experts' ranks.
    """
    comm = Communicator.named(group)
    num_tokens, num_max = weights_TK.shape[0], int(max_tokens)
    partial = partial_sums(rows_RD, weights_R, route_R, comm.size * num_max, weights_TK.shape[1])
    if format == "none":
        summed = comm.reduce_scatter(partial.to(rows_RD.dtype).view(comm.size, num_max, rows_RD.shape[1]))
    else:
        summed = _sum_coded(comm, partial, format, scale).to(rows_RD.dtype)
    return summed[:num_tokens].clone()


def partial_sums(
    rows_RD: Tensor, weights_R: Tensor, route_R: Tensor, num_tokens: int, top_k: int, end: Tensor | None = None
) -> Tensor:
    """Weighted sum of the rows that are here over a token's routes, in increasing k -> [num_tokens, D], wide dtype.

    num_tokens: of all ranks, W * M. route_R: the route of each row. end: rows from there on do not count.
    """
    row_R = torch.arange(route_R.shape[0], device=route_R.device)
    if end is not None:
        row_R = torch.where(row_R < end, row_R, -1)
    row_of_route = route_R.new_full((num_tokens * top_k,), -1).scatter_(0, route_R, row_R)
    row_of_route = row_of_route.view(-1, top_k)
    partial = torch.zeros(num_tokens, rows_RD.shape[1], dtype=wide(rows_RD.dtype), device=rows_RD.device)
    if route_R.shape[0]:
        for k in range(top_k):
            here, row = row_of_route[:, k, None] >= 0, row_of_route[:, k].clamp(min=0)
            term = rows_RD.index_select(0, row) * weights_R.index_select(0, row).unsqueeze(1).to(partial.dtype)
            partial += torch.where(here, term, 0)
    return partial


def _sum_coded(comm: Communicator, partial: Tensor, format: str, scale: str) -> Tensor:
    """Partial sums [W * M, D] to their tokens' ranks in coded rows -> their sums [M, D], in the wide dtype."""
    wire = encode_rows(partial, format, scale)
    arrived = comm.swap(wire.view(comm.size, -1)).view(wire.shape)
    decoded = decode_rows(arrived, format, scale, partial.shape[1], partial.dtype)
    return decoded.view(comm.size, -1, partial.shape[1]).sum(0)


@combine_prereduced.register_fake
def _(rows_RD, weights_TK, *_settings):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


def _setup_prereduced(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, weights_TK, *others, group, _, back, scale = inputs
    save_prereduced(ctx, rows_RD, weights_TK, tuple(others), (group, back, scale))


def save_prereduced(
    ctx: Any, rows_RD: Tensor, weights_TK: Tensor, others: tuple[Tensor, ...], settings: tuple[str, str, str]
) -> None:
    """Keep what `backward_prereduced` needs; others: weights_R, route_R, max_tokens and the layout's moves."""
    ctx.weights_shape, ctx.weights_dtype, ctx.settings = weights_TK.shape, weights_TK.dtype, settings
    ctx.save_for_backward(rows_RD, *others)


def backward_prereduced(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows_RD and of weights_TK."""
    saved = ctx.saved_tensors  # recomputation gives them out once
    _, _, route_R, max_tokens, *moves = saved
    group, format, scale = ctx.settings
    grad_RD = gather_rows(grad_TD, route_R, max_tokens, *moves, ctx.weights_shape[1], group, format, "none", scale)
    return grads_of_prereduced(ctx, saved, grad_RD)


def grads_of_prereduced(ctx: Any, saved: tuple[Tensor, ...], grad_RD: Tensor) -> tuple[Tensor, Tensor]:
    """What `backward_prereduced` returns; `grad_RD` holds the tokens' gradients as they came to the rows."""
    rows_RD, weights_R, route_R, _, *moves = saved
    group = ctx.settings[0]
    grad_RD, used = grad_RD.to(wide(grad_RD.dtype)), rows_RD[: route_R.shape[0]]
    products_R1 = (grad_RD * used).sum(1, keepdim=True)
    grad_weights = return_routes(products_R1, *moves, *ctx.weights_shape, group).squeeze(2)
    grad_rows = (grad_RD * weights_R.unsqueeze(1)).to(rows_RD.dtype)
    return pad_rows(grad_rows, rows_RD.shape[0]), grad_weights.to(ctx.weights_dtype)


def _backward_prereduced(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward_prereduced(ctx, grad_TD), *[None] * 11)


combine_prereduced.register_autograd(_backward_prereduced, setup_context=_setup_prereduced)
