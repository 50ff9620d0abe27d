"""The rows' half of dispatch: custom operators that move rows along a `Layout`, with their gradients.

    dispatch        send_routes or gather_rows            x_TD -> rows_RD
      backward      return_routes, sum over k             a combine without weights
    combine         return_routes, weighted sum over k    rows_RD -> y_TD                 ("exact")
      backward      send_routes with weights              a dispatch, plus the weights' gradient
    combine         weighted sum on the expert's rank, reduce-scatter                     ("prereduced")
      backward      gather_rows times the weights         the same, by all-gather

Sums over k run in fp32 in increasing k, in one place (`sum_routes`), so every exact path gives the same bits.
The operators are opaque to torch.compile and carry fake kernels: received row counts are dynamic sizes.

Legend: T tokens here, K routes a token, N = T * K, R rows here, D width of a row, W ranks, M = T_max of the group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeweave.comm.communicator import Communicator

op = torch.library.custom_op


def sum_routes(routes_TKD: Tensor, weights_TK: Tensor | None) -> Tensor:
    """sum_k weights[t, k] * routes[t, k] -> [T, D], fp32 accumulation in increasing k; `None` weights are ones."""
    wide = _wide(routes_TKD.dtype)
    first = routes_TKD[:, 0].to(wide)
    total = first.clone() if weights_TK is None else first * weights_TK[:, 0, None].to(wide)
    for k in range(1, routes_TKD.shape[1]):
        if weights_TK is None:
            total.add_(routes_TKD[:, k])
        else:
            total.addcmul_(routes_TKD[:, k].to(wide), weights_TK[:, k, None].to(wide))
    return total.to(routes_TKD.dtype)


def place_routes(rows: Tensor, routes: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """Rows sorted by expert and the route number of each -> [T, K, D], zeros where not routed."""
    allocate = rows.new_empty if routes.shape[0] == num_tokens * top_k else rows.new_zeros
    placed = allocate(num_tokens * top_k, rows.shape[1])
    return placed.index_copy_(0, routes, rows).view(num_tokens, top_k, rows.shape[1])


def _wide(dtype: torch.dtype) -> torch.dtype:
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
) -> Tensor:
    """Rows [T, D] to the ranks of their experts -> rows_RD by expert; multiplied by `weights_TK` before if given."""
    comm = Communicator.named(group)
    sends, receives = send_splits.tolist(), recv_splits.tolist()
    routes = order_N[: sum(sends)]
    rows = x_TD.index_select(0, routes // top_k)
    if weights_TK is not None:
        scale = weights_TK.reshape(-1).index_select(0, routes).unsqueeze(1).to(_wide(rows.dtype))
        rows = (rows * scale).to(x_TD.dtype)
    if comm.size == 1:
        return rows
    received, _ = comm.all_to_all(rows, sends, receives)
    return received.index_select(0, perm_R)


@send_routes.register_fake
def _(x_TD, order_N, send_splits, recv_splits, perm_R, weights_TK, top_k, group):  # type: ignore[no-untyped-def]
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
) -> Tensor:
    """The way back of `send_routes`: rows_RD by expert -> [T, K, D] on the tokens' ranks, zeros where not routed."""
    comm = Communicator.named(group)
    sends, receives = send_splits.tolist(), recv_splits.tolist()
    rows = rows_RD[: perm_R.shape[0]]
    if comm.size > 1:
        arrival = torch.empty_like(rows, memory_format=torch.contiguous_format).index_copy_(0, perm_R, rows)
        rows, _ = comm.all_to_all(arrival, receives, sends)
    return place_routes(rows, order_N[: sum(sends)], num_tokens, top_k)


@return_routes.register_fake
def _(rows_RD, order_N, send_splits, recv_splits, perm_R, num_tokens, top_k, group):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(num_tokens, top_k, rows_RD.shape[1])


def save_moves(ctx: Any, moves: tuple[Tensor, ...], **integers: Any) -> None:
    """Keep what `backward_rows` needs: the layout's moves and num_tokens, top_k, group."""
    ctx.save_for_backward(*moves)
    ctx.integers = integers


def backward_rows(ctx: Any, grad_RD: Tensor) -> Tensor:
    """Gradient of the rows that a dispatch sent: returned a row a route, summed over k."""
    return sum_routes(return_routes(grad_RD, *ctx.saved_tensors, **ctx.integers), None)


def _setup_send(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, *moves, weights_TK, top_k, group = inputs
    assert weights_TK is None, "weighted sends happen in backward only and have no gradient of their own"
    save_moves(ctx, tuple(moves), num_tokens=x_TD.shape[0], top_k=top_k, group=group)


def _backward_send(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    return (backward_rows(ctx, grad_RD), *[None] * 7)


send_routes.register_autograd(_backward_send, setup_context=_setup_send)


@op("moeweave::combine_routes", mutates_args=())
def combine_routes(
    rows_RD: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    send_splits: Tensor,
    recv_splits: Tensor,
    perm_R: Tensor,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Exact combine: rows_RD -> y_TD = sum_k weights[t, k] * row(t, k), and the returned routes [T, K, D]."""
    routes_TKD = return_routes(rows_RD, order_N, send_splits, recv_splits, perm_R, *weights_TK.shape, group)
    return sum_routes(routes_TKD, weights_TK), routes_TKD


@combine_routes.register_fake
def _(rows_RD, weights_TK, order_N, send_splits, recv_splits, perm_R, group):  # type: ignore[no-untyped-def]
    width = rows_RD.shape[1]
    return rows_RD.new_empty(weights_TK.shape[0], width), rows_RD.new_empty(*weights_TK.shape, width)


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows_RD, weights_TK, *moves, group = inputs
    ctx.mark_non_differentiable(output[1])
    save_combine(ctx, rows_RD, weights_TK, output[1], tuple(moves), group)


def save_combine(
    ctx: Any, rows_RD: Tensor, weights_TK: Tensor, routes_TKD: Tensor, moves: tuple[Tensor, ...], group: str
) -> None:
    """Keep what `backward_combine` needs; the returned routes only if the weights want a gradient."""
    ctx.num_rows, ctx.group = rows_RD.shape[0], group
    ctx.save_for_backward(weights_TK, *moves, *([routes_TKD] if weights_TK.requires_grad else []))


def backward_combine(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradient of an exact combine: of rows_RD, and of weights_TK if it was wanted."""
    weights_TK, order_N, send_splits, recv_splits, perm_R, *returned = ctx.saved_tensors
    moves, routes_TKD = (order_N, send_splits, recv_splits, perm_R), returned[0] if returned else None
    rows = send_routes(grad_TD, *moves, weights_TK.detach(), weights_TK.shape[1], ctx.group)
    grad_weights = None
    if routes_TKD is not None:
        wide = _wide(grad_TD.dtype)
        grad_weights = torch.einsum("td,tkd->tk", grad_TD.to(wide), routes_TKD.to(wide)).to(weights_TK.dtype)
    return _pad_rows(rows, ctx.num_rows), grad_weights


def _backward_combine(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward_combine(ctx, grad_TD), *[None] * 5)


def _pad_rows(rows_RD: Tensor, num_rows: int) -> Tensor:
    """Zero rows up to `num_rows`, for a caller whose buffer was longer than what it received."""
    if rows_RD.shape[0] == num_rows:
        return rows_RD
    return torch.nn.functional.pad(rows_RD, (0, 0, 0, num_rows - rows_RD.shape[0]))


combine_routes.register_autograd(_backward_combine, setup_context=_setup_combine)


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
) -> Tensor:
    """Every rank's rows [T, D] to every rank; those that this rank's experts need -> rows_RD by expert.

    The layout's moves are only for the gradient, which goes back a row a route as after `send_routes`.
    """
    comm = Communicator.named(group)
    num_padding = int(max_tokens) - x_TD.shape[0]
    padded = torch.nn.functional.pad(x_TD, (0, 0, 0, num_padding)) if num_padding else x_TD
    return comm.all_gather(padded).flatten(0, 1).index_select(0, route_R // top_k)


@gather_rows.register_fake
def _(x_TD, route_R, max_tokens, order_N, send_splits, recv_splits, perm_R, top_k, group):  # type: ignore[no-untyped-def]
    return x_TD.new_empty(route_R.shape[0], x_TD.shape[1])


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, _, _, *moves, top_k, group = inputs
    save_moves(ctx, tuple(moves), num_tokens=x_TD.shape[0], top_k=top_k, group=group)


def _backward_gather(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    return (backward_rows(ctx, grad_RD), *[None] * 8)


gather_rows.register_autograd(_backward_gather, setup_context=_setup_gather)


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
) -> Tensor:
    """Weighted sum over this rank's experts, one row a token and rank back, summed over ranks -> y_TD.

    `weights_TK` takes the gradient; the numbers used are `weights_R`, its copies on the experts' ranks.
    """
    comm = Communicator.named(group)
    (num_tokens, top_k), num_max = weights_TK.shape, int(max_tokens)
    row_of_route = route_R.new_full((comm.size * num_max * top_k,), -1)
    row_of_route[route_R] = torch.arange(route_R.shape[0], device=route_R.device)
    row_of_route = row_of_route.view(-1, top_k)
    partial = torch.zeros(row_of_route.shape[0], rows_RD.shape[1], dtype=_wide(rows_RD.dtype), device=rows_RD.device)
    if route_R.shape[0]:
        for k in range(top_k):
            here, row = row_of_route[:, k, None] >= 0, row_of_route[:, k].clamp(min=0)
            term = rows_RD.index_select(0, row) * weights_R.index_select(0, row).unsqueeze(1).to(partial.dtype)
            partial += torch.where(here, term, 0)
    summed = comm.reduce_scatter(partial.to(rows_RD.dtype).view(comm.size, num_max, rows_RD.shape[1]))
    return summed[:num_tokens].clone()


@combine_prereduced.register_fake
def _(rows_RD, weights_TK, weights_R, route_R, max_tokens, order_N, send_splits, recv_splits, perm_R, group):  # type: ignore[no-untyped-def]
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


def _setup_prereduced(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, weights_TK, *others, group = inputs
    ctx.weights_shape, ctx.weights_dtype, ctx.group = weights_TK.shape, weights_TK.dtype, group
    ctx.save_for_backward(rows_RD, *others)


def _backward_prereduced(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    rows_RD, weights_R, route_R, max_tokens, *moves = ctx.saved_tensors
    grad_RD = gather_rows(grad_TD, route_R, max_tokens, *moves, ctx.weights_shape[1], ctx.group)
    grad_RD, used = grad_RD.to(_wide(grad_RD.dtype)), rows_RD[: route_R.shape[0]]
    products_R1 = (grad_RD * used).sum(1, keepdim=True)
    grad_weights = return_routes(products_R1, *moves, *ctx.weights_shape, ctx.group).squeeze(2)
    grad_rows = (grad_RD * weights_R.unsqueeze(1)).to(rows_RD.dtype)
    return (_pad_rows(grad_rows, rows_RD.shape[0]), grad_weights.to(ctx.weights_dtype), *[None] * 8)


combine_prereduced.register_autograd(_backward_prereduced, setup_context=_setup_prereduced)
