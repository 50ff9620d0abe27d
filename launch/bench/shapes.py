"""Sizes of MoE layers by name, who their tokens go to, and how many bytes must cross for that.

Legend: T tokens a rank, D width, E experts, K routes a token, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeweave.launch.schema import BenchConfig, ConfigError


@dataclass(frozen=True)
class Shape:
    """T tokens a rank, D width, E experts, K routes a token, F width of an expert."""

    tokens: int
    hidden: int
    experts: int
    topk: int
    expert_hidden: int


SHAPES = {
    "v3-prefill": Shape(4096, 7168, 256, 8, 2048),
    "qwen3-30b-prefill": Shape(8192, 2048, 128, 8, 768),
    "mixtral-prefill": Shape(8192, 4096, 8, 2, 14336),
    "v3-decode128": Shape(128, 7168, 256, 8, 2048),
    "v3-decode32": Shape(32, 7168, 256, 8, 2048),
    "qwen3-decode128": Shape(128, 2048, 128, 8, 768),
}


def shape_of(config: BenchConfig) -> Shape:
    """The shape that the config names or spells out. Raises ConfigError for an unknown name."""
    if config.shape is not None:
        if config.shape not in SHAPES:
            raise ConfigError(f"shape={config.shape}: must be one of {', '.join(SHAPES)}, or left out.")
        return SHAPES[config.shape]
    return Shape(config.tokens, config.hidden, config.experts, config.topk, config.expert_hidden)


def check_shape(config: BenchConfig, ranks: int) -> None:
    """Raise ConfigError where the shape is unknown or its experts cannot be shared out."""
    shape = shape_of(config)
    if shape.experts % ranks:
        legal = ", ".join(str(n) for n in range(2, shape.experts + 1) if shape.experts % n == 0)
        more = -(-shape.experts // ranks) * ranks
        remedy = " or ".join([f"ranks to {legal}"] * bool(legal) + [f"experts={more}"] * (config.shape is None))
        raise ConfigError(f"experts={shape.experts}: must be divisible by the {ranks} ranks. Set {remedy}.")
    if shape.topk > shape.experts:
        raise ConfigError(f"topk={shape.topk}: must be at most experts={shape.experts}. Lower topk.")


def route(config: BenchConfig, shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    """ids_TK (int64, distinct in a row) and weights_TK (float32) of one rank, on the CPU."""
    generator = torch.Generator().manual_seed(config.seed * 100_003 + rank)
    T, E, K = shape.tokens, shape.experts, shape.topk
    scores_TE = torch.randn(T, E, generator=generator)
    if config.routing == "balanced":
        first_T1 = (torch.arange(T) + rank * T).unsqueeze(1) * K
        ids_TK = (first_T1 + torch.arange(K)) % E
    elif config.routing == "one_hot":
        ids_TK = torch.arange(K).expand(T, K).contiguous()
    else:
        if config.routing == "zipf":  # Gumbel top-k: sampling without replacement, chance of expert e as 1 / (e + 1)
            uniform_TE = torch.rand(T, E, generator=generator).clamp(1e-9, 1 - 1e-9)
            scores_TE = -torch.log(torch.arange(E) + 1.0) - torch.log(-torch.log(uniform_TE))
        ids_TK = scores_TE.topk(K, dim=1).indices
    return ids_TK, scores_TE.gather(1, ids_TK).softmax(1)


def crossing_bytes(config: BenchConfig, ranks: int) -> int:
    """What must leave an average rank in a dispatch: each token once to each remote rank that it needs."""
    shape = shape_of(config)
    pairs = sum(
        remote_pairs(route(config, shape, rank)[0], rank, shape.experts // ranks, ranks) for rank in range(ranks)
    )
    return pairs // ranks * shape.hidden * getattr(torch, config.dtype).itemsize


def remote_pairs(ids_TK: Tensor, rank: int, num_local: int, ranks: int) -> int:
    """(token, rank) pairs of `rank`'s tokens elsewhere: rows that must leave if each goes once to each such rank."""
    owners_TK = ids_TK // num_local
    return sum(int((owners_TK == other).any(1).sum()) for other in range(ranks) if other != rank)
