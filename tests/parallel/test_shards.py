"""Who holds which positions, and attention over them: against the whole sequence in one process."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moeweave.comm.communicator import Communicator
from moeweave.kernels_ext.tolerance import TOLERANCE, relative_error
from moeweave.parallel import ring
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.ring import CausalMask, DenseMask, FullMask, ring_attention
from moeweave.parallel.shards import Shards
from moeweave.parallel.ulysses import heads_of, repeat_keys, to_heads, to_positions
from run_ranks import run_ranks


class Ranks(Communicator):
    """A number of ranks, of which none is asked to communicate."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.group, self.size, self.rank, self.name = None, size, rank, ""


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 9), st.booleans())
def test_every_position_is_held_once_and_shards_are_even(length: int, size: int, zigzag: bool) -> None:
    shards = Shards(length, Ranks(size), zigzag)
    whole = torch.arange(length).view(1, length)
    held = [shards.take(whole, 1, rank) for rank in range(size)]
    assert sorted(torch.cat(held, 1).flatten().tolist()) == list(range(length))
    assert [x.shape[1] for x in held] == [shards.held_by(rank) for rank in range(size)]
    assert shards.step - shards.least <= (2 if zigzag else 1)
    assert shards.least >= 1 or length < size * (2 if zigzag else 1)
    assert torch.equal(shards.merge(shards.split(whole, 1), 1), whole)


def test_zigzag_evens_out_what_a_causal_mask_leaves() -> None:
    shards = Shards(64, Ranks(4), zigzag=True)
    seen = [sum(position + 1 for span in shards.spans_of(rank) for position in range(*span)) for rank in range(4)]
    assert len(set(seen)) == 1


def inputs(heads: int, keys: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, 8), (2, keys, length, 8), (2, keys, length, 5), (2, heads, length, 5)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def mask_of(kind: str, length: int) -> Tensor | None:
    """[S, S] or [B, 1, S, S] bool, or additive for each head; None is every key."""
    at = torch.arange(length)
    causal = at.unsqueeze(1) >= at
    if kind == "window":
        return causal & (at.unsqueeze(1) - at < 3)
    if kind == "left":  # the first two queries of row 1 see nothing
        return causal & (at >= torch.tensor([0, 2]).view(2, 1, 1, 1))
    if kind == "bias":
        slopes = torch.arange(1, 5).view(1, 4, 1, 1) / 4
        return torch.where(causal, -slopes * (at.unsqueeze(1) - at), float("-inf"))
    return causal if kind == "causal" else None


def attend(way: str, kind: str, sizes: list[int], dtype: str) -> list[float]:
    """Relative errors of the output and of the gradients of q, k, v, in one tensor each."""
    heads, keys, length = sizes
    q, k, v, grad = inputs(heads, keys, length, getattr(torch, dtype))
    mask = mask_of(kind, length)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    repeated = [wide[0], *(x.repeat_interleave(heads // keys, 1) for x in wide[1:])]
    additive = None if mask is None else mask.double() if mask.is_floating_point() else mask
    want = scaled_dot_product_attention(*repeated, attn_mask=additive)
    want.backward(grad.double())

    group = Mesh(sp=torch.distributed.get_world_size()).group("sp")
    shards = Shards(length, Communicator(group), zigzag=way == "ring")
    mine = [shards.take(x, 2).requires_grad_() for x in (q, k, v)]
    # A few queries at a time, so that blocks are cut.
    with patch.object(ring, "TILE", 3):
        out = (ringed if way == "ring" else ulysses)(mine, kind, mask, shards)
        out.backward(shards.take(grad, 2))
    got, wanted = [out, *(x.grad for x in mine)], [want, *(x.grad for x in wide)]
    return [relative_error(a.double(), shards.take(b, 2)) for a, b in zip(got, wanted, strict=True)]


def ringed(mine: list[Tensor], kind: str, mask: Tensor | None, shards: Shards) -> Tensor:
    known: Any = {"causal": CausalMask(), "full": FullMask()}
    return ring_attention(*mine, known.get(kind) or DenseMask(mask), None, shards)


def ulysses(mine: list[Tensor], kind: str, mask: Tensor | None, shards: Shards) -> Tensor:
    q, k, v = to_heads([mine[0], *(repeat_keys(x, shards.comm.size) for x in mine[1:])], shards)
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = heads_of(mask, 1, shards.comm)
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return to_positions(out.transpose(1, 2), shards).transpose(1, 2)


@pytest.mark.parametrize("kind", ["causal", "full", "window", "left", "bias"])
@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_attention_is_that_of_the_whole_sequence(way: str, kind: str) -> None:
    for errors in run_ranks(2, attend, way, kind, [4, 2, 11], "float32"):
        assert max(errors) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("way", "sizes", "dtype"),
    [
        ("ring", [3, 1, 13], "bfloat16"),
        ("ulysses", [8, 2, 6], "float32"),  # more ranks than key heads
        pytest.param("ulysses", [12, 3, 9], "float32", marks=pytest.mark.slow),  # key heads that ranks do not divide
        pytest.param("ring", [3, 3, 9], "float64", marks=pytest.mark.slow),
        pytest.param("ring", [4, 2, 64], "float32", marks=pytest.mark.slow),
    ],
)
def test_heads_and_dtypes(way: str, sizes: list[int], dtype: str) -> None:
    for errors in run_ranks(4, attend, way, "causal", sizes, dtype):
        assert max(errors) <= TOLERANCE[getattr(torch, dtype)]
