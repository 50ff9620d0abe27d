"""Lazy tensors: any box of what comes out of tensor code equals that box of the real result, and reads no more."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.parallel.hf.boxes import Box, box_shape, box_slices, contains, intersect
from moeweave.parallel.hf.lazy import LazySource, LazyTensor

PROGRAMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "stack": lambda a, b: torch.stack([a, b, a], dim=0),
    "stack in the middle": lambda a, b: torch.stack([a, b], 1),
    "cat": lambda a, b: torch.cat([a, b, a], dim=1),
    "experts": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "transposed": lambda a, b: torch.transpose(torch.stack([a, b]), dim0=1, dim1=2).contiguous(),
    "split again": lambda a, b: [one.squeeze(0) for one in torch.chunk(torch.stack([a, b]), 2, dim=0)][1],
    "chunk": lambda a, b: torch.cat([a, b], 0).chunk(3, dim=0)[2],
    "split": lambda a, b: torch.split(torch.cat([a, b], 1), [5, 7], dim=1)[1],
    "index": lambda a, b: torch.stack([a, b])[1, ..., 2:4],
    "new dims": lambda a, b: a[..., None].permute(2, 1, 0).unsqueeze(-1),
    "unbind": lambda a, b: torch.unbind(torch.stack([a, b], 2), dim=2)[1],
    "cast": lambda a, b: torch.cat([a, b]).to(torch.bfloat16),
    "T": lambda a, b: a.T,
    "whole only": lambda a, b: torch.cat([a, b]).reshape(2, 4, 6).transpose(0, 1).reshape(8, 6),
    "many results": lambda a, b: torch.cat([a, b]).mul(2).chunk(2)[1],
}

WHOLE = ("whole only", "many results")  # reshape and mul have no rule


class Source:
    """A real tensor behind a lazy one, that counts the numbers read."""

    def __init__(self, key: str, real: Tensor):
        self.real, self.read = real, 0
        self.lazy = LazySource.of(key, real.shape, real.dtype, self.read_box)

    def read_box(self, box: Box) -> Tensor:
        part = self.real[box_slices(box)]
        self.read += part.numel()
        return part


def random_box(shape: torch.Size) -> Box:
    ends = (sorted(random.sample(range(size + 1), 2)) for size in shape)
    return tuple((start, stop) for start, stop in ends)


@pytest.mark.parametrize("name", PROGRAMS)
def test_boxes_equal_those_of_the_real_result(name: str) -> None:
    a, b = Source("a", torch.arange(24.0).view(4, 6)), Source("b", torch.arange(24.0).view(4, 6) + 100)
    lazy, real = PROGRAMS[name](a.lazy, b.lazy), PROGRAMS[name](a.real, b.real)
    assert isinstance(lazy, LazyTensor)
    assert (lazy.shape, lazy.dtype) == (real.shape, real.dtype)
    assert torch.equal(lazy.read(), real)
    for _ in range(25):
        box = random_box(real.shape)
        a.read = b.read = 0
        assert torch.equal(lazy.read(box), real[box_slices(box)])
        if name not in WHOLE:
            assert a.read + b.read == torch.Size(box_shape(box)).numel()
            assert sum(torch.Size(box_shape(leaf)).numel() for _, leaf in lazy.leaves(box)) == a.read + b.read


def test_nothing_computes_with_numbers_that_are_not_there() -> None:
    lazy = Source("a", torch.ones(2, 2)).lazy
    with pytest.raises(RuntimeError, match="no numbers"), torch._C.DisableTorchFunctionSubclass():
        lazy + 1
    with pytest.raises(ValueError, match="do not concatenate"):
        torch.cat([lazy, Source("b", torch.ones(2, 3)).lazy])
    with pytest.raises(IndexError, match="out of range"):
        lazy[2]


def test_boxes_meet() -> None:
    assert intersect(((0, 4), (2, 6)), ((3, 8), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(((0, 4),), ((4, 8),)) is None
    assert contains(((0, 4),), ((1, 4),))
    assert not contains(((0, 4),), ((1, 5),))
