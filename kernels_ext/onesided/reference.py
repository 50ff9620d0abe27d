"""One-sided dispatch and combine in plain PyTorch, all ranks in one process: what the kernels are compared with.

Lists hold one tensor a rank. Rows are by expert, then source rank, then route, as everywhere in comm/.

Legend: T tokens of a rank, G tokens of all ranks, K routes a token, D width, R rows of a rank, W ranks, e its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Coded = Callable[[Tensor], Tensor]


def identity(rows: Tensor) -> Tensor:
    """Rows that travel as they are.

    In its place a codec's function decodes what it encoded: to the rows' dtype for `dispatch`, and to float32 for sums,
    where nothing is rounded before it is added.
    """
    return rows


def rows_of_routes(ids: Sequence[Tensor], num_experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Row at `rank` of every route [G, K], -1 where it goes elsewhere, and ends of the experts int32 [e].

    Ranks of 1 expert, ids [[1, 0]] on rank 0 and [[0, -1]] on rank 1: at rank 0 [[-1, 0], [1, -1]], ends [2].
    """
    ids_GK = torch.cat(list(ids))
    num_local = num_experts // len(ids)
    local = ids_GK.reshape(-1) - rank * num_local
    here = (local >= 0) & (local < num_local) & (ids_GK.reshape(-1) < num_experts)
    key = torch.where(here, local, num_local)
    rows = torch.full_like(key, -1)
    order = torch.argsort(key, stable=True)[: int(here.sum())]
    rows[order] = torch.arange(order.numel(), device=rows.device)
    counts = torch.bincount(key, minlength=num_local + 1)[:num_local]
    return rows.view_as(ids_GK), counts.cumsum(0).to(torch.int32)


def dispatch(
    xs: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_experts: int,
    rank: int,
    coded: Coded = identity,
) -> tuple[Tensor, Tensor, Tensor]:
    """rows_RD, weights fp32 [R] and ends of the experts at `rank`."""
    row_GK, ends_e = rows_of_routes(ids, num_experts, rank)
    token, k = (row_GK >= 0).nonzero(as_tuple=True)
    row = row_GK[token, k]
    x_GD = coded(torch.cat(list(xs)))
    rows_RD, weights_R = x_GD.new_empty(row.numel(), x_GD.shape[1]), x_GD.new_empty(row.numel(), dtype=torch.float32)
    rows_RD[row], weights_R[row] = x_GD[token], torch.cat(list(weights)).float()[token, k]
    return rows_RD, weights_R, ends_e


def partial_sums(rows_RD: Tensor, weights_R: Tensor | None, row_GK: Tensor) -> Tensor:
    """Of one rank, for every token fp32 [G, D]: weighted rows in increasing k, products and sums rounded one by one."""
    total = torch.zeros(row_GK.shape[0], rows_RD.shape[1], dtype=torch.float32, device=rows_RD.device)
    for k in range(row_GK.shape[1]):
        token = (row_GK[:, k] >= 0).nonzero()[:, 0]
        row = row_GK[token, k]
        weight = 1.0 if weights_R is None else weights_R[row].unsqueeze(1)
        total[token] += rows_RD[row].float() * weight
    return total


def combine(
    rows: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    ids: Sequence[Tensor],
    num_experts: int,
    coded: Coded = identity,
) -> list[Tensor]:
    """Prereduced: y [T, D] of every rank; weights are [R] of the rows, or None for ones."""
    total = torch.zeros(sum(map(len, ids)), rows[0].shape[1], dtype=torch.float32, device=rows[0].device)
    for rank, (rows_RD, weights_R) in enumerate(zip(rows, weights, strict=True)):
        row_GK, _ = rows_of_routes(ids, num_experts, rank)
        came = (row_GK >= 0).any(1)
        total[came] += coded(partial_sums(rows_RD, weights_R, row_GK).to(rows_RD.dtype))[came].float()
    return list(total.to(rows[0].dtype).split([len(each) for each in ids]))


def combine_exact(
    rows: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    ids: Sequence[Tensor],
    num_experts: int,
    coded: Coded = identity,
) -> list[Tensor]:
    """Exact: a row a route, summed on the token's rank in increasing k; weights are [T, K] of the tokens."""
    ids_GK = torch.cat(list(ids))
    routes = torch.zeros(*ids_GK.shape, rows[0].shape[1], dtype=torch.float32, device=ids_GK.device)
    for rank, rows_RD in enumerate(rows):
        row_GK, _ = rows_of_routes(ids, num_experts, rank)
        token, route = (row_GK >= 0).nonzero(as_tuple=True)
        routes[token, route] = coded(rows_RD)[row_GK[token, route]].float()
    total = torch.zeros(ids_GK.shape[0], rows[0].shape[1], dtype=torch.float32, device=ids_GK.device)
    for k in range(ids_GK.shape[1]):
        weight = 1.0 if weights is None else torch.cat(list(weights)).float()[:, k, None]
        total += routes[:, k] * weight
    return list(total.to(rows[0].dtype).split([len(each) for each in ids]))


def gradients(
    grads: Sequence[Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor], ids: Sequence[Tensor], num_experts: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of a weighted combine: gradients of the rows [R, D] of every rank, and of the weights fp32 [T, K]."""
    grad_GD, ids_GK = torch.cat(list(grads)), torch.cat(list(ids))
    grad_GK = torch.zeros(ids_GK.shape, dtype=torch.float32, device=ids_GK.device)
    grad_rows = []
    for rank, (rows_RD, weights_R) in enumerate(zip(rows, weights, strict=True)):
        row_GK, _ = rows_of_routes(ids, num_experts, rank)
        token, k = (row_GK >= 0).nonzero(as_tuple=True)
        row = row_GK[token, k]
        grad_RD = torch.zeros_like(rows_RD)
        grad_RD[row] = (grad_GD[token].float() * weights_R[row].unsqueeze(1)).to(rows_RD.dtype)
        grad_GK[token, k] = (grad_GD[token].float() * rows_RD[row].float()).sum(1)
        grad_rows.append(grad_RD)
    return grad_rows, list(grad_GK.split([len(each) for each in ids]))
