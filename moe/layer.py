"""`MoELayer`: router, experts and shared experts as siblings, each replaceable.

The layer knows no mesh. Expert parallelism replaces the call `layer.experts(x_TD, ids_TK, weights_TK)`; data
parallelism sets `layer.reduce` so that the balance losses see the global batch. Balance losses are added to the graph
here (`_AddLoss`), so no one has to carry them to the training loop, and no pipeline stage in between.

Legend: T tokens (all leading dims of the input, flattened), D width, E experts, K routes a token.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.moe.balance import Reduce, apply_capacity, aux_loss, load, z_loss
from moeweave.moe.experts import ACTIVATIONS, Experts
from moeweave.moe.router import Router

logger = logging.getLogger("moeweave")


class MoELayer(nn.Module):
    """A mixture-of-experts feed-forward layer: `y = layer(x)`, x and y of shape [..., D].

    One pass:
        1. route     router(x_TD) -> logits_TE, weights_TK, ids_TK: K of E experts for each token
        2. balance   training only: auxiliary and z-loss from logits and ids; routes counted in `load_E`
        3. capacity  if set: routes that an expert has no room for become -1, are counted in `dropped` and add nothing
        4. experts   experts(x_TD, ids_TK, weights_TK) -> y_TD: rows sorted by expert, two grouped GEMMs around the
                     activation, weighted sum over k in float32 (expert parallelism replaces this call)
        5. shared    + shared_experts(x_TD), which every token takes; times sigmoid(shared_expert_gate(x_TD)) if gated
        6. inject    y_TD as it is, with the losses of step 2 in its graph: `backward` adds their gradients

    No token is dropped unless `capacity` is set. Parameters start normal(0, 0.02), biases at zero.

    Args:
        dim: D, width of a token.
        hidden_dim: width inside an expert.
        num_experts: E.
        top_k: K, experts a token is sent to.
        router: kind of router ("softmax", "topk_softmax", "sigmoid"), or a `Router` built with its options.
        activation: "silu", "gelu" or "relu", of routed and shared experts.
        gated: experts compute down(act(gate(x)) * up(x)) if True, down(act(up(x))) if False.
        bias: give the routed experts' projections a bias.
        shared_hidden_dim: width inside the shared expert, 0 for none.
        shared_gate: weigh the shared expert's output by a learned sigmoid gate.
        aux_coef, z_coef: coefficients of the load-balancing loss (1 when balanced) and of the router z-loss; 0 is off.
        capacity: an expert takes at most ceil(capacity * T * K / E) routes of a call; None takes all.
        drop: what an overfull expert drops: "probability" the smallest weights, "position" the last tokens.
    Attributes:
        load_E: int64 [E], routes per expert, before capacity, over the training calls since `reset_stats`.
        dropped: int64, routes dropped for want of capacity since then.
        reduce: sums a tensor over the ranks that share a batch, for losses over the global one; None is this rank's.
            A rank's loss gradient then is its part of the global one times the number of ranks, to be averaged.
        aux_share: weight of the balance losses in `backward`; 1 / n when n micro-batches make one step, times the
            scale where a loss scaler is used.
    Raises ValueError on a size or choice that does not fit.

    Example:
        >>> layer = MoELayer(dim=2048, hidden_dim=768, num_experts=64, top_k=8, aux_coef=1e-3)
        >>> layer(torch.randn(4, 128, 2048)).shape
        torch.Size([4, 128, 2048])
    """

    load_E: Tensor
    dropped: Tensor
    losses: Tensor

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        router: str | Router = "softmax",
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        shared_hidden_dim: int = 0,
        shared_gate: bool = False,
        aux_coef: float = 0.0,
        z_coef: float = 0.0,
        capacity: float | None = None,
        drop: str = "probability",
    ) -> None:
        super().__init__()
        _validate(shared_hidden_dim, shared_gate, aux_coef, z_coef, capacity, drop)
        self.router = router if isinstance(router, Router) else Router(dim, num_experts, top_k, kind=router)
        _validate_router(self.router, dim, num_experts, top_k)
        self.experts = Experts(dim, hidden_dim, num_experts, activation=activation, gated=gated, bias=bias)
        self.shared_experts = None
        self.shared_expert_gate = None
        if shared_hidden_dim:
            self.shared_experts = SharedExperts(dim, shared_hidden_dim, activation=activation, gated=gated)
        if shared_gate:
            self.shared_expert_gate = nn.Linear(dim, 1, bias=False)
            nn.init.normal_(self.shared_expert_gate.weight, std=0.02)
        self.num_experts, self.top_k = num_experts, top_k
        self.aux_coef, self.z_coef = aux_coef, z_coef
        self.capacity, self.drop = capacity, drop
        self.reduce: Reduce | None = None
        self.aux_share = 1.0
        # Not checkpointed, so a layer built on meta must have them for real.
        device = torch.get_default_device()
        device = torch.device("cpu") if device.type == "meta" else device
        self.register_buffer("load_E", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("losses", torch.zeros(3, dtype=torch.float32, device=device), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the pass of the class docstring.

        x: [..., D] in the parameters' dtype; may hold no token.
        mask: bool, x's leading dims, False for padding: such tokens run but count neither in losses nor in `load_E`.
        Returns y like x. Raises ValueError if x or mask has the wrong shape.
        """
        x_TD, mask_T = self._flatten(x, mask)
        logits_TE, weights_TK, ids_TK = self.router(x_TD)
        loss = self._balance(logits_TE, ids_TK, mask_T) if self.training else None
        if self.capacity is not None:
            per_expert = math.ceil(self.capacity * ids_TK.shape[0] * self.top_k / self.num_experts)
            ids_TK, weights_TK, dropped = apply_capacity(ids_TK, weights_TK, per_expert, by=self.drop)
            if self.training:
                accumulate(self.dropped, dropped)
        y_TD = self.experts(x_TD, ids_TK, weights_TK)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * shared_TD
            y_TD = y_TD + shared_TD
        if loss is not None and torch.is_grad_enabled():
            y_TD = _AddLoss.apply(y_TD, loss)
        return unflatten(y_TD, x.shape)

    def stats(self) -> dict[str, Any]:
        """What to log of the training calls since `reset_stats`. Reads the device.

        Returns aux_loss and z_loss (means over calls, 0 where off), load_E and dropped, which is logged too if not 0.
        """
        aux, z, calls = self.losses.tolist()
        dropped, routes = int(self.dropped), int(self.load_E.sum())
        if dropped:
            logger.info("capacity %s dropped %d of %d routes, by %s", self.capacity, dropped, routes, self.drop)
        calls = max(calls, 1.0)
        return {"aux_loss": aux / calls, "z_loss": z / calls, "load_E": self.load_E.clone(), "dropped": dropped}

    def reset_stats(self) -> None:
        """Forget what was counted."""
        for counter in (self.load_E, self.dropped, self.losses):
            counter.zero_()

    def extra_repr(self) -> str:
        return f"aux_coef={self.aux_coef}, z_coef={self.z_coef}, capacity={self.capacity}"

    def _flatten(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dim = self.router.weight.shape[1]
        if x.shape[-1] != dim:
            raise ValueError(f"x {tuple(x.shape)} must end in dim ({dim}), the width that the layer was built for.")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask {tuple(mask.shape)} must be {tuple(x.shape[:-1])}, one bool a token. Reshape it.")
        return x.reshape(-1, dim), None if mask is None else mask.reshape(-1).bool()

    def _balance(self, logits_TE: Tensor, ids_TK: Tensor, mask_T: Tensor | None) -> Tensor | None:
        """Count the routes; return the weighted sum of the losses that are on, None if none is."""
        accumulate(self.load_E, load(ids_TK, self.num_experts, mask_T))
        terms = {}
        if self.aux_coef:
            terms[0] = aux_loss(self.router.probabilities(logits_TE), ids_TK, mask_T, reduce=self.reduce)
        if self.z_coef:
            terms[1] = z_loss(logits_TE, mask_T, reduce=self.reduce)
        if not terms:
            return None
        zero, one = logits_TE.new_zeros((), dtype=torch.float32), logits_TE.new_ones((), dtype=torch.float32)
        accumulate(self.losses, torch.stack([*(terms.get(i, zero).detach().float() for i in range(2)), one]))
        coefs = (self.aux_coef, self.z_coef)
        return self.aux_share * torch.stack([coefs[i] * term for i, term in terms.items()]).sum()


class SharedExperts(nn.Module):
    """The feed-forward network that every token takes: [T, D] -> [T, D], gated or not, normal(0, 0.02)."""

    def __init__(self, dim: int, hidden_dim: int, *, activation: str = "silu", gated: bool = True) -> None:
        super().__init__()
        self.act_fn = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False) if gated else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)
        for param in self.parameters():
            nn.init.normal_(param, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        up_TI = self.up_proj(x_TD)
        return self.down_proj(
            self.act_fn(up_TI) if self.gate_proj is None else self.act_fn(self.gate_proj(x_TD)) * up_TI
        )


class _AddLoss(torch.autograd.Function):
    """Returns y; in backward `loss` gets the gradient 1, as if it had been added to the training loss."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device)


def unflatten(y_TD: Tensor, shape: torch.Size) -> Tensor:
    """[T, D] -> [..., D], not marked as a view: FSDP warns of one, and loses its hook if the caller adds in place."""
    if y_TD.shape == shape:
        return y_TD
    unflattened: Tensor = torch.ops.aten._unsafe_view(y_TD, shape)
    return unflattened


@torch.library.custom_op("moeweave::accumulate", mutates_args=("total",))
def accumulate(total: Tensor, value: Tensor) -> None:
    """total += value, once a forward pass: activation checkpointing that runs it again does not count again."""
    if torch._C._current_graph_task_id() == -1:  # else inside backward: a recomputation
        total += value


@accumulate.register_fake
def _(total: Tensor, value: Tensor) -> None:
    return None


def _validate(
    shared_hidden_dim: int, shared_gate: bool, aux_coef: float, z_coef: float, capacity: float | None, drop: str
) -> None:
    if shared_hidden_dim < 0:
        raise ValueError(f"MoELayer.shared_hidden_dim ({shared_hidden_dim}) must not be negative. Use 0 for none.")
    if shared_gate and not shared_hidden_dim:
        raise ValueError("MoELayer.shared_gate (True) needs a shared expert. Set shared_hidden_dim.")
    for name, coef in (("aux_coef", aux_coef), ("z_coef", z_coef)):
        if coef < 0:
            raise ValueError(f"MoELayer.{name} ({coef}) must not be negative. Use 0 to switch the loss off.")
    if capacity is not None and capacity <= 0:
        raise ValueError(f"MoELayer.capacity ({capacity}) must be positive. Use None to drop no token.")
    if drop not in ("probability", "position"):
        raise ValueError(f"MoELayer.drop ({drop!r}) must be 'probability' or 'position'.")


def _validate_router(router: Router, dim: int, num_experts: int, top_k: int) -> None:
    got = (router.weight.shape[1], router.num_experts, router.top_k)
    if got != (dim, num_experts, top_k):
        raise ValueError(
            f"MoELayer.router (dim, num_experts, top_k = {got}) must have the layer's {(dim, num_experts, top_k)}. "
            "Build the router with the same sizes."
        )
