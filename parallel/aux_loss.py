"""The load-balancing loss of the global batch, whichever ranks the tokens are on.

Hugging Face models compute it from their own tokens; here counts and probabilities are first summed over the ranks that
route different tokens. Every rank adds the same global term to its loss, and losses are averaged over loss ranks.

Legend: B sequences, S positions, T tokens here, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.parallel.record import Record


def balances(model: nn.Module, batch: dict[str, Any]) -> bool:
    """True if `model(**batch)` adds transformers' load-balancing loss to its own."""
    if "output_router_logits" not in inspect.signature(model.forward).parameters:
        return False
    asked = batch.get("output_router_logits")
    config: Any = model.config
    if asked is None:
        owner = config if hasattr(config, "output_router_logits") else config.get_text_config()
        asked = getattr(owner, "output_router_logits", False)
    return bool(asked)


def check_output(output: Any) -> None:
    """Raise ValueError for a tuple, whose balance loss cannot be told from the rest of it to be made global."""
    if isinstance(output, tuple):
        raise ValueError(
            "return_dict=False gives a tuple, in which the balance loss cannot be told from the rest. Leave it out and "
            "call .to_tuple() on the output, or set output_router_logits=False."
        )


def check_routers(record: Record) -> None:
    """Raise ValueError unless the router of all experts was found: the balance loss is made of what routers return."""
    if unknown := [block.path for block in record.blocks if block.router_path is None]:
        raise ValueError(
            "The balance loss under pp, sp and tp_sequence is computed from the routers' outputs, and no router was "
            f"found for {', '.join(unknown)}. Set output_router_logits=False."
        )


def sums_over_ranks(record: Record) -> bool:
    """Whether balance losses see more than this rank's tokens."""
    return record.plan.aux == "global" and record.routing_group.size() > 1


def add_balance_loss(output: Any, logits: list[Tensor], mask: Tensor | None, record: Record) -> None:
    """Put the global loss into a model's output, whose own computation was switched off: `aux_loss`, and `loss`.

    Args:
        logits: router logits [T, E] of each layer. mask: attention mask of the same tokens, [B, S] with B * S = T.
    """
    check_output(output)
    zeros = logits[0].new_zeros(2 * logits[0].shape[-1] + 1, dtype=torch.float32)
    aux = balance_loss(balance_sums(logits, mask, record.top_k, zeros), record)
    if output.loss is not None:
        output.loss = output.loss + record.aux_coef * record.aux_share * aux
    record.balanced = True
    output.aux_loss = aux
    output.router_logits = tuple(logits)


def global_aux_loss(logits: tuple[Tensor, ...], aux_local: Tensor, mask: Tensor | None, record: Record) -> Tensor:
    """Load-balancing loss of the global batch, equal on every rank.

    Switch Transformer's (arXiv 2101.03961, equations 4-6), as transformers computes it: num_experts times the sum over
    experts of (share of tokens with the expert among their top k) * (mean probability), layers taken together.

    Args:
        logits: router logits [T, E] of each layer. mask: attention mask [B, S] with B * S = T, or None.
        aux_local: what the model computed from this rank's tokens; checked against the formula at the first call.
    """
    num_experts = logits[0].shape[-1]
    sums = balance_sums(logits, mask, record.top_k, logits[0].new_zeros(2 * num_experts + 1, dtype=torch.float32))
    if not record.aux_checked:
        _check_formula(_switch_loss(sums), aux_local, logits[0].dtype, record)
        record.aux_checked = True
    return balance_loss(sums, record)


def balance_sums(logits: Iterable[Tensor], mask: Tensor | None, top_k: int, before: Tensor) -> Tensor:
    """`before` plus what the load-balancing loss needs of layers: routes [E], probability [E] and rows [1], in one.

    Args:
        logits: router logits [T, E] of each layer. mask: attention mask [B, S] with B * S = T, or None.
        before: [2 E + 1] of the layers so far.
    """
    flat = None if mask is None or mask.dim() != 2 else mask.reshape(-1).to(torch.float32)
    for layer_TE in logits:
        probs_TE = torch.softmax(layer_TE, dim=-1)
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.float32).scatter_(
            1, torch.topk(probs_TE, top_k, dim=-1).indices, 1.0
        )
        kept = flat if flat is not None and flat.numel() == layer_TE.shape[0] else None
        probs_TE = probs_TE.float()
        rows = before.new_full((1,), layer_TE.shape[0])
        if kept is not None:
            chosen_TE, probs_TE = chosen_TE * kept.unsqueeze(1), probs_TE * kept.unsqueeze(1)
            rows = kept.sum().reshape(1)
        before = before + torch.cat([chosen_TE.sum(0), probs_TE.sum(0), rows])
    return before


def balance_loss(sums: Tensor, record: Record) -> Tensor:
    """The loss of `balance_sums`, those of all ranks together if the plan says so."""
    if sums_over_ranks(record):
        sums = _SumOverRanks.apply(sums, record)
    return _switch_loss(sums)


def _switch_loss(sums: Tensor) -> Tensor:
    num_experts = sums.numel() // 2
    counts_E, probs_E, rows = sums[:num_experts].detach(), sums[num_experts:-1], sums[-1].detach()
    return num_experts * (counts_E * probs_E).sum() / rows**2


def _check_formula(formula: Tensor, aux_local: Tensor, dtype: torch.dtype, record: Record) -> None:
    """Raise on every data rank if on one of them the model's loss is another than the formula's."""
    ours, model = float(formula.detach()), float(aux_local.detach())
    # Some releases average bf16 probabilities in bf16.
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2
    differs = torch.tensor(float(abs(ours - model) > tolerance * max(abs(model), 1e-6)), device=formula.device)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=record.mesh.data_group)
    if differs:
        raise ValueError(
            f"Plan.aux ('global') needs the load-balancing loss of Switch Transformer: from the router logits it is "
            f"{ours:.6g} here, this model reports {model:.6g}. Use Plan(aux='rank') to keep the model's own, per rank."
        )


def sum_over_ranks(x: Tensor, record: Record) -> Tensor:
    """Sum over the ranks that route different tokens, for `MoELayer.reduce`, whose last element counts loss ranks."""
    total = x.clone()
    dist.all_reduce(total, group=record.routing_group)
    total[-1] *= record.mesh.loss_size / record.routing_group.size()
    return total


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks that route different tokens. Every rank's loss holds the same global term and losses are
    averaged over loss ranks, so the sum over ranks that the gradient needs is a multiplication."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, record: Record) -> Tensor:
        ctx.loss_size = record.mesh.loss_size
        total = x.clone()
        dist.all_reduce(total, group=record.routing_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.loss_size, None
