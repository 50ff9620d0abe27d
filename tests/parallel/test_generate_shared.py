"""`generate` of models cut into stages whose ranks share prompts: the tokens of one process, each position once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_zoo
import moeweave as mw
from moeweave.parallel.stages import Hole
from parity_matrix import ranks_of
from run_ranks import run_ranks

pytestmark = pytest.mark.transformers("5.9", "5.0 leaves the cache to the model, and ring needs masks of 5.9")
Fields = dict[str, Any]
SP2, RING, ULYSSES = dict(pp=2, sp=2), dict(sequence="ring"), dict(sequence="ulysses")
BEAMS = dict(num_beams=2)


def prompts(data_rank: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, S] and their mask, padded on the left by another amount in every row."""
    generator = torch.Generator().manual_seed(50 + data_rank)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    mask = torch.arange(length) >= torch.arange(rows).unsqueeze(1)
    return ids * mask, mask.long()


def count_positions(model: nn.Module) -> dict[str, int]:
    """Positions [B * s] that come into each attention of this rank's stages in passes over more than one a row."""
    seen: dict[str, int] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: Fields) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            path = f"layer {module.layer_idx}"
            seen[path] = seen.get(path, 0) + hidden.shape[:2].numel()

    for layer in model.model.layers:
        if not isinstance(layer, Hole):
            layer.self_attn.register_forward_pre_hook(count, with_kwargs=True)
    return seen


def on_ranks(name: str, sizes: Fields, plan: Fields, rows: int, length: int, options: Fields) -> Fields:
    mesh = mw.Mesh(**sizes, device="cpu")
    model, solo = (hf_zoo.build(name, num_hidden_layers=2 * mesh.sizes.pp).eval() for _ in range(2))
    model = mw.parallelize(model, mesh, mw.Plan(**plan))
    seen, data = count_positions(model), mesh.data_rank
    ids, mask = prompts(data, rows, length + 2 * data)
    options = dict(do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0) | options
    tokens = []
    for each in (model, solo):
        each.config.output_router_logits = False
        tokens.append(each.generate(ids, attention_mask=mask, max_new_tokens=4 + 2 * data, **options))
    return dict(
        tokens=tokens,
        data=data,
        sp=mesh.dense.get_local_rank("sp"),
        seen=seen,
        routes={path: int(load_E.sum()) for path, load_E in mw.expert_load(model).items()},
    )


def checked(name: str, sizes: Fields, plan: Fields, rows: int, length: int, options: Fields) -> list[Fields]:
    found = run_ranks(ranks_of(sizes), on_ranks, name, sizes, plan, rows, length, options)
    for rank in found:
        got, want = rank["tokens"]
        assert torch.equal(got, want)
    return found


# Positions of a prompt of data rank 0, then of 1 (two more), that each rank of sp is to compute.
COUNTED = [
    ("deepseek_v3", SP2, ULYSSES, 3, 7, {}, [[3, 4]]),
    ("qwen3_moe", dict(SP2, ep=2), RING, 3, 9, {}, [[5, 4]]),
    ("mixtral", dict(SP2, dp=2, ep=4), ULYSSES, 2, 7, {}, [[3, 4], [4, 5]]),
]
COUNTED_SLOW = [
    # Windows of 6 positions: of all layers, then of every second.
    ("mixtral", dict(sp=2, ep=2), RING, 2, 9, {}, [[5, 4]]),
    ("mixtral", dict(SP2, ep=2), RING, 3, 5, {}, [[3, 2]]),
    ("gpt_oss", dict(SP2, ep=2), ULYSSES, 3, 9, BEAMS, [[4, 5]]),
    ("deepseek_v3", SP2, RING, 3, 7, {}, [[3, 4]]),
    ("deepseek_v3", dict(SP2, dp=2, ep=2), RING, 3, 7, {}, [[3, 4], [5, 4]]),
    ("qwen3_moe", SP2, ULYSSES, 1, 9, {}, [[4, 5]]),
    ("qwen3_moe", dict(SP2, ep=2), ULYSSES, 5, 8, {}, [[4, 4]]),
    ("qwen3_moe", dict(SP2, ep=2), RING, 2, 9, BEAMS, [[5, 4]]),
    ("qwen3_moe", dict(pp=2, sp=4, ep=4), RING, 2, 9, {}, [[3, 2, 2, 2]]),
    ("qwen3_moe", dict(pp=4, sp=2), ULYSSES, 5, 6, {}, [[3, 3]]),
]


@pytest.mark.parametrize(
    ("name", "sizes", "plan", "rows", "length", "options", "held"),
    [*COUNTED, *(pytest.param(*case, marks=pytest.mark.slow) for case in COUNTED_SLOW)],
)
def test_every_stage_shares_out_the_prompt(
    name: str, sizes: Fields, plan: Fields, rows: int, length: int, options: Fields, held: list[list[int]]
) -> None:
    rows_run = rows * options.get("num_beams", 1)
    for rank in checked(name, sizes, plan, rows, length, options):
        own = rows_run * held[rank["data"]][rank["sp"]]
        decoded = rows_run * (3 + 2 * rank["data"])
        assert list(rank["seen"].values()) == [own, own]
        assert rank["routes"] and set(rank["routes"].values()) == {2 * (own + decoded)}


@pytest.mark.parametrize(
    ("name", "sizes", "plan", "rows", "length", "options"),
    [
        ("qwen3_moe", SP2, ULYSSES, 2, 9, dict(cache_implementation="static")),  # whole prompts
        ("qwen3_moe", SP2, RING, 2, 1, {}),  # fewer positions than ranks
        ("qwen3_moe", dict(SP2, tp=2, ep=2), dict(RING, tp_sequence=True), 3, 9, {}),
        ("deepseek_v3", dict(pp=2, tp=2, ep=2), dict(tp_sequence=True), 3, 9, {}),
        ("qwen3_moe", dict(SP2, dp=2), dict(ULYSSES, schedule="interleaved"), 3, 7, {}),
        ("qwen3_moe", SP2, dict(ULYSSES, overlap="microbatch", overlap_min_tokens=0), 4, 7, {}),
    ],
)
@pytest.mark.slow
def test_tokens_are_those_of_one_process(
    name: str, sizes: Fields, plan: Fields, rows: int, length: int, options: Fields
) -> None:
    checked(name, sizes, plan, rows, length, options)
