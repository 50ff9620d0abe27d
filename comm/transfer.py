"""The rows' half of dispatch: custom operators that move rows along a `Layout`, a row a route, with their gradients.

    dispatch        send_routes                           x_TD -> rows_RD
      backward      return_routes, sum over k             a combine without weights
    combine         return_routes, weighted sum over k    rows_RD -> y_TD
      backward      send_routes with weights              a dispatch, plus the weights' gradient

Sums over k run in fp32 in increasing k, in one place (`sum_routes`), so every exact path gives the same bits.
Rows are coded before they leave and decoded where they arrive, `format` and `scale` as in `codec`; those that stay on
their rank are coded too, so that a result does not depend on where an expert lives. The gradient goes straight through:
backward sends it in `back`, a format of its own.
The operators are opaque to torch.compile and carry fake kernels: received row counts are dynamic sizes.

Legend: T tokens here, K routes a token, N = T * K, R rows here, D width of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeweave.comm.codec import decode_rows, encode_rows
from moeweave.comm.communicator import Communicator

op = torch.library.custom_op


def sum_routes(routes_TKD: Tensor, weights_TK: Tensor | None) -> Tensor:
    """sum_k weights[t, k] * routes[t, k] -> [T, D], fp32 accumulation in increasing k; `None` weights are ones."""
    # Routes are widened inside the kernels that read them: a widened copy of each would be most of the traffic.
    dtype = wide(routes_TKD.dtype)
    weights_TK = None if weights_TK is None else weights_TK.to(dtype)
    first = routes_TKD[:, 0]
    total = first.to(dtype, copy=True) if weights_TK is None else first * weights_TK[:, 0, None]
    for k in range(1, routes_TKD.shape[1]):
        if weights_TK is None:
            total.add_(routes_TKD[:, k])
        else:
            total.addcmul_(routes_TKD[:, k], weights_TK[:, k, None])
    return total.to(routes_TKD.dtype)


def place_routes(rows: Tensor, routes: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """Rows sorted by expert and the route number of each -> [T, K, D], zeros where not routed."""
    allocate = rows.new_empty if routes.shape[0] == num_tokens * top_k else rows.new_zeros
    placed = allocate(num_tokens * top_k, rows.shape[1])
    return placed.index_copy_(0, routes, rows).view(num_tokens, top_k, rows.shape[1])


def to_words(rows_RD: Tensor, format: str, scale: str) -> Tensor:
    """Rows as they travel: themselves with "none", else wire rows as int64, which are gathered 8 bytes at a time."""
    return rows_RD if format == "none" else encode_rows(rows_RD, format, scale).view(torch.int64)


def from_words(words: Tensor, format: str, scale: str, width: int, dtype: torch.dtype) -> Tensor:
    """The way back of `to_words`."""
    return words if format == "none" else decode_rows(words.view(torch.uint8), format, scale, width, dtype)


def weighted_rows(x_TD: Tensor, weights_TK: Tensor, routes_N: Tensor) -> Tensor:
    """weights[t, k] * x[t] for each route t * K + k of `routes_N`, in x's dtype."""
    weights_N1 = weights_TK.reshape(-1).index_select(0, routes_N).unsqueeze(1).to(wide(x_TD.dtype))
    rows_ND = x_TD.index_select(0, routes_N // weights_TK.shape[1])
    return torch.mul(rows_ND, weights_N1, out=rows_ND)  # multiplied in the wider dtype and rounded, in one pass


def grad_of_weights(grad_TD: Tensor, routes_TKD: Tensor, dtype: torch.dtype) -> Tensor:
    """grad[t] . route(t, k) -> [T, K]."""
    widest = wide(grad_TD.dtype)
    return torch.einsum("td,tkd->tk", grad_TD.to(widest), routes_TKD.to(widest)).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@op("moeweave::send_routes", mutates_args=())
def send_routes(
    x_TD: Tensor,
    order_N: Tensor,
    send_splits: Tensor,
    recv_splits: Tensor,
    perm_R: Tensor,
    weights_TK: Tensor | None,
    top_k: int,
    group: str,
    format: str = "none",
    back: str = "none",
    scale: str = "token",
) -> Tensor:
    """Rows [T, D] to the ranks of their experts -> rows_RD by expert; multiplied by `weights_TK` before if given."""
    comm = Communicator.named(group)
    sends, receives = send_splits.tolist(), recv_splits.tolist()
    routes = order_N[: sum(sends)]
    if weights_TK is None:
        words = to_words(x_TD, format, scale).index_select(0, routes // top_k)
    else:
        words = to_words(weighted_rows(x_TD, weights_TK, routes), format, scale)
    if comm.size > 1:
        received, _ = comm.all_to_all(words, sends, receives)
        words = received.index_select(0, perm_R)
    return from_words(words, format, scale, x_TD.shape[1], x_TD.dtype)


@send_routes.register_fake
def _(x_TD, order_N, send_splits, recv_splits, perm_R, *_settings):  # type: ignore[no-untyped-def]
    return x_TD.new_empty(perm_R.shape[0], x_TD.shape[1])


@op("moeweave::return_routes", mutates_args=())
def return_routes(
    rows_RD: Tensor,
    order_N: Tensor,
    send_splits: Tensor,
    recv_splits: Tensor,
    perm_R: Tensor,
    num_tokens: int,
    top_k: int,
    group: str,
    format: str = "none",
    scale: str = "token",
) -> Tensor:
    """The way back of `send_routes`: rows_RD by expert -> [T, K, D] on the tokens' ranks, zeros where not routed."""
    comm = Communicator.named(group)
    sends, receives = send_splits.tolist(), recv_splits.tolist()
    words = to_words(rows_RD[: perm_R.shape[0]], format, scale)
    if comm.size > 1:
        arrival = torch.empty_like(words, memory_format=torch.contiguous_format).index_copy_(0, perm_R, words)
        words, _ = comm.all_to_all(arrival, receives, sends)
    rows = from_words(words, format, scale, rows_RD.shape[1], rows_RD.dtype)
    return place_routes(rows, order_N[: sum(sends)], num_tokens, top_k)


@return_routes.register_fake
def _(rows_RD, order_N, send_splits, recv_splits, perm_R, num_tokens, top_k, *_settings):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(num_tokens, top_k, rows_RD.shape[1])


def save_moves(ctx: Any, moves: tuple[Tensor, ...], **settings: Any) -> None:
    """Keep what `backward_rows` needs: the layout's moves and num_tokens, top_k, group, format, scale."""
    ctx.save_for_backward(*moves)
    ctx.settings = settings


def backward_rows(ctx: Any, grad_RD: Tensor) -> Tensor:
    """Gradient of the rows that a dispatch sent: returned a row a route, summed over k."""
    return sum_routes(return_routes(grad_RD, *ctx.saved_tensors, **ctx.settings), None)


def register_dispatch(operator: Any, first: int) -> None:
    """The gradient of an operator that moves tokens' rows to experts.

    Its inputs are x_TD, then others, of which the layout's moves are from `first` on, and the last five are top_k,
    group, format, back and scale.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        top_k, group, _, back, scale = inputs[-5:]
        settings = dict(top_k=top_k, group=group, format=back, scale=scale)
        save_moves(ctx, inputs[first : first + 4], num_tokens=inputs[0].shape[0], **settings)
        ctx.num_others = len(inputs) - 1

    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return (backward_rows(ctx, grad_RD), *[None] * ctx.num_others)

    operator.register_autograd(backward, setup_context=setup)


# Weighted sends happen in backward only and have no gradient of their own.
register_dispatch(send_routes, 1)


@op("moeweave::combine_routes", mutates_args=())
def combine_routes(
    rows_RD: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    send_splits: Tensor,
    recv_splits: Tensor,
    perm_R: Tensor,
    group: str,
    format: str = "none",
    back: str = "none",
    scale: str = "token",
) -> tuple[Tensor, Tensor]:
    """Exact combine: rows_RD -> y_TD = sum_k weights[t, k] * row(t, k), and the returned routes [T, K, D]."""
    moves = (order_N, send_splits, recv_splits, perm_R)
    routes_TKD = return_routes(rows_RD, *moves, *weights_TK.shape, group, format, scale)
    return sum_routes(routes_TKD, weights_TK), routes_TKD


@combine_routes.register_fake
def _(rows_RD, weights_TK, *_settings):  # type: ignore[no-untyped-def]
    width = rows_RD.shape[1]
    return rows_RD.new_empty(weights_TK.shape[0], width), rows_RD.new_empty(*weights_TK.shape, width)


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows_RD, weights_TK, *moves, group, _, back, scale = inputs
    ctx.mark_non_differentiable(output[1])
    save_combine(ctx, rows_RD, weights_TK, output[1], tuple(moves), (group, back, scale))


def save_combine(
    ctx: Any,
    rows_RD: Tensor,
    weights_TK: Tensor,
    routes_TKD: Tensor,
    moves: tuple[Tensor, ...],
    settings: tuple[str, str, str],
) -> None:
    """Keep what `backward_combine` needs; the returned routes only if the weights want a gradient.

    settings: group, format of the gradient's way, scale.
    """
    ctx.num_rows, ctx.settings = rows_RD.shape[0], settings
    ctx.save_for_backward(weights_TK, *moves, *([routes_TKD] if weights_TK.requires_grad else []))


def backward_combine(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradient of an exact combine: of rows_RD, and of weights_TK if it was wanted."""
    weights_TK, order_N, send_splits, recv_splits, perm_R, *returned = ctx.saved_tensors
    moves, routes_TKD = (order_N, send_splits, recv_splits, perm_R), returned[0] if returned else None
    group, format, scale = ctx.settings
    rows = send_routes(grad_TD, *moves, weights_TK.detach(), weights_TK.shape[1], group, format, "none", scale)
    grad_weights = None
    if routes_TKD is not None:
        grad_weights = grad_of_weights(grad_TD, routes_TKD, weights_TK.dtype)
    return pad_rows(rows, ctx.num_rows), grad_weights


def _backward_combine(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward_combine(ctx, grad_TD), *[None] * 8)


def pad_rows(rows_RD: Tensor, num_rows: int) -> Tensor:
    """Zero rows up to `num_rows`, for a caller whose buffer was longer than what it received."""
    if rows_RD.shape[0] == num_rows:
        return rows_RD
    return torch.nn.functional.pad(rows_RD, (0, 0, 0, num_rows - rows_RD.shape[0]))


combine_routes.register_autograd(_backward_combine, setup_context=_setup_combine)
