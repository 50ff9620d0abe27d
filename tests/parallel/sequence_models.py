"""A plain model with attention, to share sequences of: rotary positions and masks are arguments of its layers.

Legend: B rows, S positions, D width, H heads of width d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import moeweave as mw
import plain_models
from moeweave.parallel.loss import global_tokens

HEADS, HEAD_DIM, KEY_HEADS = 4, 8, 2


class Attention(nn.Module):
    """Grouped-query attention through F.scaled_dot_product_attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        self.q_proj = nn.Linear(dim, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(dim, KEY_HEADS * HEAD_DIM)
        self.v_proj = nn.Linear(dim, KEY_HEADS * HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, dim)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotary), rotate(k, rotary)
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class Layer(nn.Module):
    def __init__(self, dim: int, own: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = Attention(dim)
        self.moe = own_layer(dim) if own else plain_models.Block(plain_models.packed_experts)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norms[0](x), rotary, mask)
        return x + self.moe(self.norms[1](x))


def own_layer(dim: int) -> nn.Module:
    return mw.MoELayer(dim, 24, num_experts=8, top_k=2, shared_hidden_dim=8, aux_coef=0.1, z_coef=0.05)


class Model(nn.Module):
    """Embedding, layers, head; returns the loss. With `window` a query sees that many positions; with `own` the experts
    are in `mw.MoELayer`s, whose balance losses are on."""

    splits_sequence = True
    chained_layers = True

    def __init__(self, window: int = 0, own: bool = False) -> None:
        super().__init__()
        self.window = window
        self.embed = nn.Embedding(plain_models.VOCAB, plain_models.DIM)
        self.layers = nn.ModuleList(Layer(plain_models.DIM, own) for _ in range(2))
        self.head = nn.Linear(plain_models.DIM, plain_models.VOCAB, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, at = self.embed(input_ids), torch.arange(input_ids.shape[1])
        rotary = at.unsqueeze(1) / 3.0 ** torch.arange(HEAD_DIM // 2)
        apart = at.unsqueeze(1) - at
        mask = (apart >= 0) & (apart < self.window) if self.window else None
        for layer in self.layers:
            x = layer(x, rotary, mask=mask)
        logits = self.head(x)[:, :-1].flatten(0, 1)
        total = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        return total / global_tokens(labels)


def build(**options: Any) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Model(**options)
