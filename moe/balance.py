"""What keeps the experts evenly loaded: two losses, a bias update without a loss, and capacity. Pure functions.

Losses over several ranks take `reduce`, a function that sums a tensor over them (an all-reduce). Their value is then
the global batch's on every rank; their gradient on a rank is such that the mean over ranks is the global gradient, as
data parallelism averages it.

Legend: T tokens, K routes a token, E experts, N = T * K routes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def load(ids_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Count routes: load_E int64. Ids outside [0, num_experts) are not routed, tokens with mask False do not count."""
    routed_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    if mask_T is not None:
        routed_TK = routed_TK & mask_T.unsqueeze(1)
    slots_N = torch.where(routed_TK, ids_TK, num_experts).reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_TK.device)
    return counts.scatter_add_(0, slots_N, torch.ones_like(slots_N))[:num_experts]


def aux_loss(probs_TE: Tensor, ids_TK: Tensor, mask_T: Tensor | None = None, *, reduce: Reduce | None = None) -> Tensor:
    """Load-balancing loss: E times the sum over experts of (share of the routes) * (mean probability). 1 when balanced.

    Two tokens with probabilities [0.8, 0.2] and [0.6, 0.4], both routed to expert 0: 2 * (1 * 0.7 + 0 * 0.3) = 1.4.

    probs_TE: [T, E] router probabilities, each row sums to 1. ids_TK: [T, K] int64, -1 is not routed.
    mask_T: [T] bool, False for padding. reduce: sums over the ranks that share the batch; None is this rank alone.
    Returns a float32 scalar (float64 of float64), 0 without tokens. Hugging Face's loss is K times this one.
    """
    wide = _widen(probs_TE)
    num_experts = wide.shape[1]
    mass_E = (wide if mask_T is None else wide * mask_T.unsqueeze(1)).sum(0)
    counts_E = load(ids_TK, num_experts, mask_T).to(wide.dtype)
    tokens = _num_tokens(wide, mask_T)
    here = torch.cat([counts_E, mass_E.detach(), tokens.view(1), torch.ones_like(tokens).view(1)])
    total = here if reduce is None else reduce(here)
    counts_E, global_mass_E, (tokens, ranks) = total[:num_experts], total[num_experts : 2 * num_experts], total[-2:]
    share_E = counts_E / counts_E.sum().clamp(min=1.0)
    per_token = num_experts / tokens.clamp(min=1.0)
    value = per_token * torch.dot(share_E, global_mass_E)
    return _with_value(value, per_token * ranks * torch.dot(share_E, mass_E))


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None, *, reduce: Reduce | None = None) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the router's logits, which keeps them small.

    Logits [0, 0] give ln(2)^2 = 0.48. Arguments and result as for `aux_loss`.
    """
    wide = _widen(logits_TE)
    squares_T = torch.logsumexp(wide, dim=-1).square()
    mass = (squares_T if mask_T is None else squares_T * mask_T).sum()
    tokens = _num_tokens(wide, mask_T)
    here = torch.stack([mass.detach(), tokens, torch.ones_like(tokens)])
    global_mass, tokens, ranks = here if reduce is None else reduce(here)
    tokens = tokens.clamp(min=1.0)
    return _with_value(global_mass / tokens, mass * ranks / tokens)


def bias_update(load_E: Tensor, rate: float) -> Tensor:
    """Change of the choice-only router bias after a step (DeepSeek-V3): up for underloaded experts, down for others.

    Loads [5, 1, 3] and rate 0.1 give [-0.1, 0.1, 0.0]. load_E: routes per expert over the global batch. Float32 out.
    """
    load_E = load_E.to(torch.float64)
    return (rate * torch.sign(load_E.mean() - load_E)).to(torch.float32)


def apply_capacity(
    ids_TK: Tensor, weights_TK: Tensor, capacity_per_expert: int, by: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the routes that an expert has no room for. No other route changes: the weights are not renormalised.

    Ids [[0], [0], [0]], weights [[.2], [.9], [.5]], capacity 2: by position the third goes, by probability the first.

    ids_TK: [T, K] int64, -1 is not routed. capacity_per_expert: routes that an expert takes from these tokens.
    by: "position" keeps the first ones by token, "probability" the ones of largest weight, equal ones by token.
    Returns ids_TK with -1 and weights_TK with 0 for what was dropped, and how many were (int64 scalar, on the device).
    Raises ValueError on a negative capacity or an unknown `by`.
    """
    if by not in ("position", "probability"):
        raise ValueError(f"by ({by!r}) must be 'position' or 'probability': which routes an expert drops.")
    if capacity_per_expert < 0:
        raise ValueError(f"capacity_per_expert ({capacity_per_expert}) must not be negative. Pass 0 or more routes.")
    ids_N = ids_TK.reshape(-1)
    order_N = torch.arange(ids_N.shape[0], device=ids_N.device)
    if by == "probability":
        order_N = torch.argsort(weights_TK.detach().reshape(-1), descending=True, stable=True)
    by_expert_N = torch.argsort(ids_N[order_N], stable=True)
    order_N, sorted_N = order_N[by_expert_N], ids_N[order_N][by_expert_N]
    first_N = torch.searchsorted(sorted_N, sorted_N)
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device) - first_N
    dropped_TK = ((rank_N >= capacity_per_expert) & (ids_N >= 0)).view_as(ids_TK)
    return ids_TK.masked_fill(dropped_TK, -1), weights_TK.masked_fill(dropped_TK, 0.0), dropped_TK.sum()


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _num_tokens(x_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    return x_TE.new_full((), x_TE.shape[0]) if mask_T is None else mask_T.sum().to(x_TE.dtype)


def _with_value(value: Tensor, carrier: Tensor) -> Tensor:
    """`value`, with the gradient of `carrier`."""
    return carrier + (value - carrier).detach()
