"""What dispatch and combine must give: a plain loop over ranks, tokens and routes, on inputs that are a function of
(rank, token), so that every rank knows the whole answer.

Legend: T tokens of a rank, K routes a token, D width, R rows that arrive, E experts, e experts of a rank, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One exchange: tokens per rank, routes a token, and how they are spread.

    routing: "spread" over all experts; "holes", a third of the routes -1 and some tokens without any; "none", all -1;
    "hot", every first route to one expert and the rest -1; "beyond", a third of the ids are >= num_experts.
    """

    tokens: tuple[int, ...]
    top_k: int = 2
    num_experts: int = 8
    dim: int = 24
    routing: str = "spread"
    dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        counts = "-".join(map(str, self.tokens))
        return f"{self.routing}-T{counts}-K{self.top_k}-E{self.num_experts}-D{self.dim}-{str(self.dtype)[6:]}"

    @property
    def world(self) -> int:
        return len(self.tokens)


def two_nodes(size: int) -> list[int]:
    """The node that each of `size` ranks of one machine is taken to be on: the first half on 0, the rest on 1."""
    return [int(rank >= size // 2) for rank in range(size)] if size > 1 else [0]


def tokens_of(case: Case, rank: int) -> Tensor:
    """x_TD of a rank."""
    t, d = torch.arange(case.tokens[rank], dtype=torch.float64)[:, None], torch.arange(case.dim, dtype=torch.float64)
    return torch.sin(0.1 + 1.7 * rank + 0.61 * t + 0.37 * d * (1 + t % 5)).to(case.dtype)


def ids_of(case: Case, rank: int) -> Tensor:
    """ids_TK of a rank; a token's experts differ, and follow no order."""
    t, k = torch.arange(case.tokens[rank])[:, None], torch.arange(case.top_k)
    num_experts = case.num_experts
    ids_TK = (5 * t + 3 * rank + t * t // 3 + (num_experts - 1) * k) % num_experts
    thin_TK = (t + 2 * k + rank) % 3 == 0
    if case.routing == "holes":
        ids_TK = ids_TK.masked_fill(thin_TK | (t % 7 == 3), -1)
    elif case.routing == "beyond":
        ids_TK = torch.where(thin_TK, num_experts + ids_TK, ids_TK)
    elif case.routing == "hot":
        ids_TK = torch.where(k == 0, num_experts - 2, torch.full_like(ids_TK, -1))
    elif case.routing == "none":
        ids_TK = torch.full_like(ids_TK, -1)
    return ids_TK


def weights_of(case: Case, rank: int) -> Tensor:
    """weights_TK of a rank: positive, unequal; also where nothing is routed."""
    t, k = torch.arange(case.tokens[rank], dtype=torch.float64)[:, None], torch.arange(case.top_k, dtype=torch.float64)
    default = torch.float64 if case.dtype == torch.float64 else torch.float32
    return (0.55 + 0.45 * torch.sin(2.3 * t + 1.1 * k + 0.7 * rank)).to(case.weights_dtype or default)


def experts_of(case: Case) -> Tensor:
    """One matrix [D, D] an expert."""
    e, i = torch.arange(case.num_experts, dtype=torch.float64)[:, None, None], torch.arange(case.dim).double()
    return (torch.cos(0.9 * e + 0.17 * i[:, None] * (1 + e % 3) + 0.31 * i) / case.dim**0.5).to(case.dtype)


def probe_of(case: Case, rank: int) -> Tensor:
    """Gradient of y_TD that backward starts from."""
    t, d = torch.arange(case.tokens[rank], dtype=torch.float64)[:, None], torch.arange(case.dim, dtype=torch.float64)
    return torch.cos(0.3 + 0.9 * rank + 0.43 * t + 0.21 * d).to(case.dtype)


def routes_by_row(case: Case, rank: int, size: int) -> list[tuple[int, int, int, int]]:
    """(expert, source, token, k) of every row that a rank of `size` receives: by expert, then source, then route."""
    per_rank = case.num_experts // size
    here = range(rank * per_rank, (rank + 1) * per_rank)
    return sorted(
        (int(expert), source, token, k)
        for source in range(case.world)
        for token, experts in enumerate(ids_of(case, source).tolist())
        for k, expert in enumerate(experts)
        if expert in here
    )


@dataclass(frozen=True)
class Answer:
    """Of one rank: output and gradients, in float64. grad_experts is of all experts, summed over ranks."""

    y_TD: Tensor
    grad_x_TD: Tensor
    grad_weights_TK: Tensor
    grad_experts: Tensor


def plain(case: Case) -> list[Answer]:
    """y[t] = sum_k weights[t, k] * (x[t] @ experts[ids[t, k]]) and its gradients, one route at a time, in float64."""
    experts = experts_of(case).double()
    grad_experts = torch.zeros_like(experts)
    answers = []
    for rank in range(case.world):
        x_TD, ids_TK, weights_TK = tokens_of(case, rank).double(), ids_of(case, rank), weights_of(case, rank).double()
        probe_TD = probe_of(case, rank).double()
        y_TD, grad_x_TD, grad_weights_TK = torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(weights_TK)
        for t in range(case.tokens[rank]):
            for k in range(case.top_k):
                expert = int(ids_TK[t, k])
                if not 0 <= expert < case.num_experts:
                    continue
                weight, out_D = weights_TK[t, k], x_TD[t] @ experts[expert]
                y_TD[t] += weight * out_D
                grad_weights_TK[t, k] = probe_TD[t] @ out_D
                grad_x_TD[t] += weight * (experts[expert] @ probe_TD[t])
                grad_experts[expert] += weight * torch.outer(x_TD[t], probe_TD[t])
        answers.append(Answer(y_TD, grad_x_TD, grad_weights_TK, grad_experts))
    return answers


def leaves_of(case: Case, rank: int, shift: int = 0) -> list[Tensor]:
    """x_TD, weights_TK and this rank's experts, to take gradients of; `shift` changes the tokens."""
    per_rank = case.num_experts // case.world
    mine = experts_of(case)[rank * per_rank : (rank + 1) * per_rank].clone()
    x_TD = tokens_of(case, rank) * (1 + shift)
    return [leaf.requires_grad_() for leaf in (x_TD, weights_of(case, rank), mine)]


def run_experts(mine: Tensor, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
    """One row at a time, so that cutting the rows elsewhere changes no bit."""
    pieces = [rows_RD[:0] + 0 * mine.sum()]
    for expert, (start, end) in enumerate(pairwise([0, *offsets_e.tolist()])):
        pieces += [rows_RD[row : row + 1] @ mine[expert] for row in range(start, end)]
    return torch.cat(pieces)
