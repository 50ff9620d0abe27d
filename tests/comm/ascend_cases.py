"""What dispatch and combine over Ascend's operators must give: experts multiply by powers of two, so that nothing is
rounded on the way.

Legend: T tokens of a rank, K routes a token, D width, R rows that arrive, E experts, e experts of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from plain_moe import Case, ids_of, routes_by_row, tokens_of, weights_of


def factor_of(expert: Tensor) -> Tensor:
    """What an expert of these tests multiplies its rows by: a power of two, so that nothing is rounded."""
    return torch.exp2((expert % 5).double() - 2)


def apply_experts(case: Case, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
    """Rows of this rank through its experts; two rows more than were given, and NaN past the last offset."""
    per_rank = case.num_experts // case.world
    expert_R = torch.bucketize(torch.arange(rows_RD.shape[0]), offsets_e, right=True) + dist.get_rank() * per_rank
    out_RD = (rows_RD.double() * factor_of(expert_R)[:, None]).to(case.dtype)
    out_RD[int(offsets_e[-1]) :] = float("nan")
    return torch.cat([out_RD, torch.full((2, case.dim), float("nan"), dtype=case.dtype)])


def oracle(case: Case, rank: int) -> Tensor:
    """y_TD of a rank in float64, one route at a time."""
    x_TD, ids_TK, weights_TK = tokens_of(case, rank).double(), ids_of(case, rank), weights_of(case, rank).double()
    y_TD = torch.zeros_like(x_TD)
    for t, k in ((ids_TK >= 0) & (ids_TK < case.num_experts)).nonzero().tolist():
        y_TD[t] += weights_TK[t, k] * factor_of(ids_TK[t, k]) * x_TD[t]
    return y_TD


def expected_rows(case: Case, rank: int) -> tuple[Tensor, list[int]]:
    routes = routes_by_row(case, rank, case.world)
    rows = [tokens_of(case, source)[token] for _, source, token, _ in routes]
    per_rank = case.num_experts // case.world
    counts = [sum(expert == rank * per_rank + e for expert, *_ in routes) for e in range(per_rank)]
    return torch.stack(rows) if rows else torch.empty(0, case.dim, dtype=case.dtype), counts
