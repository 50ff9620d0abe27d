"""Small models in plain PyTorch, one for each way in which experts can be built, and their batches.

Legend: B rows, S tokens of a row, T = B * S, D width, I hidden width of an expert, E experts, K routes a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from moeweave.moe.experts import Experts
from moeweave.parallel.adapter import MoEAdapter, register_moe
from moeweave.parallel.loss import global_tokens

NUM_EXPERTS, TOP_K, DIM, HIDDEN, VOCAB = 8, 2, 16, 12, 40


def top_k_of(logits_TE: Tensor, top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
    """Router logits -> ids_TK, weights_TK that sum to 1."""
    probs_TK, ids_TK = torch.softmax(logits_TE, dim=-1).topk(top_k, dim=-1)
    return ids_TK, probs_TK / probs_TK.sum(-1, keepdim=True)


class StackedExperts(nn.Module):
    """Parameters with the experts as dim 0, in a layout of its own, and a bias; arguments in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.n_routed_experts = NUM_EXPERTS
        self.up = nn.Parameter(0.3 * torch.randn(NUM_EXPERTS, DIM, HIDDEN))
        self.down = nn.Parameter(0.3 * torch.randn(NUM_EXPERTS, HIDDEN, DIM))
        self.down_bias = nn.Parameter(0.1 * torch.randn(NUM_EXPERTS, DIM))

    def forward(self, x_TD: Tensor, expert_weights: Tensor, expert_ids: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for expert in range(self.n_routed_experts):
            token, k = torch.where(expert_ids == expert)
            rows = silu(x_TD[token] @ self.up[expert]) @ self.down[expert] + self.down_bias[expert]
            out_TD = out_TD.index_add(0, token, rows * expert_weights[token, k, None])
        return out_TD


class ListedExperts(nn.Module):
    """A ModuleList of expert MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(mlp() for _ in range(NUM_EXPERTS))

    def forward(self, x_TD: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for expert, each in enumerate(self.mlps):
            token, k = torch.where(indices == expert)
            out_TD = out_TD.index_add(0, token, each(x_TD[token]) * weights[token, k, None])
        return out_TD


def mlp() -> nn.Module:
    layers = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, DIM))
    with torch.no_grad():
        for param in layers.parameters():
            param.copy_(0.3 * torch.randn_like(param))
    return layers


class Block(nn.Module):
    """Router and experts; tokens [B, S, D]."""

    def __init__(self, experts: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, NUM_EXPERTS, bias=False)
        nn.init.normal_(self.gate.weight, std=0.7)
        self.experts = experts()
        self.forced = False

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        ids_TK, weights_TK = top_k_of(self.gate(x_TD))
        if self.forced:
            ids_TK = torch.arange(TOP_K).expand_as(ids_TK)
        if isinstance(self.experts, StackedExperts):
            return self.experts(x_TD, expert_ids=ids_TK, expert_weights=weights_TK).view_as(x)
        return self.experts(x_TD, ids_TK, weights_TK).view_as(x)


class OwnRoutingBlock(nn.Module):
    """Routes inside its own forward, and has a shared expert: `register_moe` says how to cut it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, NUM_EXPERTS, bias=False)
        nn.init.normal_(self.gate.weight, std=0.7)
        self.mlps = nn.ModuleList(mlp() for _ in range(NUM_EXPERTS))
        self.shared = mlp()
        self.forced = False

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        ids_TK, weights_TK = top_k_of(self.gate(x_TD))
        return torch.arange(TOP_K).expand_as(ids_TK) if self.forced else ids_TK, weights_TK

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x_TD = x.flatten(0, -2)
        ids_TK, weights_TK = self.route(x_TD)
        out_TD = torch.zeros_like(x_TD)
        for expert, each in enumerate(self.mlps):
            token, k = torch.where(ids_TK == expert)
            out_TD = out_TD.index_add(0, token, each(x_TD[token]) * weights_TK[token, k, None])
        return out_TD.view_as(x) + self.shared(x), None


register_moe(
    OwnRoutingBlock,
    MoEAdapter(
        "mlps", lambda block, x_TD: block.route(x_TD), lambda block, x, y_TD: (y_TD.view_as(x) + block.shared(x), None)
    ),
)

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "packed": lambda: Block(packed_experts),
    "stacked": lambda: Block(StackedExperts),
    "modulelist": lambda: Block(ListedExperts),
    "registered": OwnRoutingBlock,
}


def packed_experts() -> nn.Module:
    experts = Experts(DIM, HIDDEN, NUM_EXPERTS, bias=True)
    with torch.no_grad():
        for param in experts.parameters():
            param.copy_(0.3 * torch.randn_like(param))
    return experts


class Layer(nn.Module):
    """Norm, something dense, MoE block."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.moe = BLOCKS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(x)).cumsum(1) / 4
        out: Any = self.moe(self.norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)


class Model(nn.Module):
    """Embedding, layers (a ModuleList; with `flat` one layer as a child), head. Returns the loss."""

    chained_layers = True

    def __init__(self, kind: str, flat: bool = False, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        if flat:
            self.layer = Layer(kind)
        else:
            self.layers = nn.ModuleList(Layer(kind) for _ in range(num_layers))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers if hasattr(self, "layers") else [self.layer]:
            x = layer(x)
        return x

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.hidden(input_ids))[:, :-1].flatten(0, 1)
        total = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        return total / global_tokens(labels)


def build(kind: str, flat: bool = False, num_layers: int = 2, dtype: torch.dtype = torch.float32) -> Model:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = Model(kind, flat, num_layers)
    return model.to(dtype)


def make_batch(rank: int, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """input_ids and labels [rows, length], the labels ignored at the end, at another place in every row and rank."""
    generator = torch.Generator().manual_seed(300 + rank)
    input_ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    kept_B = torch.tensor([length - (2 * rank + 3 * row + 1) % (length // 2) for row in range(rows)])
    labels = input_ids.masked_fill(torch.arange(length)[None, :] >= kept_B[:, None], -100)
    return {"input_ids": input_ids, "labels": labels}
