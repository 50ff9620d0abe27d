"""Sums of rows: every implementation against a loop, and bits that repeat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeweave.kernels_ext.sum_rows import OP, bag_impl, sum_rows
from moeweave.kernels_ext.tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def terms_of(counts: list[int], num_rows: int) -> tuple[Tensor, Tensor]:
    ends_S = torch.tensor([0, *counts]).cumsum(0)
    return (7 * torch.arange(int(ends_S[-1])) + 3) % max(num_rows, 1), ends_S


@pytest.mark.parametrize("impl", [each.name for each in OP.implementations])
def test_worked_example(impl: str) -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0]])
    terms, ends, weights = torch.tensor([2, 0, 1]), torch.tensor([0, 2, 2, 3]), torch.tensor([10.0, 1.0, 1.0])
    assert sum_rows(rows, terms, ends, weights, impl=impl).tolist() == [[14.0], [0.0], [2.0]]


@pytest.mark.parametrize("impl", [each.name for each in OP.implementations])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[], [0, 0], [1] * 9, [0, 3, 1, 0, 8, 2]], ids=str)
def test_equals_a_loop(impl: str, dtype: torch.dtype, counts: list[int]) -> None:
    rows_RD = torch.randn(11, 5, dtype=torch.float64).to(dtype)
    terms_N, ends_S = terms_of(counts, 11)
    for weights_R in (None, torch.rand(11, dtype=torch.float64)):
        got = sum_rows(rows_RD, terms_N, ends_S, weights_R, impl=impl)
        want = torch.zeros(len(counts), 5, dtype=torch.float64)
        for s in range(len(counts)):
            for r in terms_N[ends_S[s] : ends_S[s + 1]].tolist():
                want[s] += rows_RD[r].double() * (1 if weights_R is None else weights_R[r])
        assert got.dtype == dtype
        assert_close("sums", got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_do_not_change_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_RD, weights_R = torch.randn(40, 24).to(dtype), torch.rand(40)
    terms_N, ends_S = terms_of([3, 0, 2, 1, 5, 4, 0], 40)
    whole = sum_rows(rows_RD, terms_N, ends_S, weights_R, impl="bag")
    monkeypatch.setattr(bag_impl, "BLOCK_BYTES", 1)
    assert torch.equal(sum_rows(rows_RD, terms_N, ends_S, weights_R, impl="bag"), whole)
    part = sum_rows(rows_RD, terms_N, ends_S[2:5], weights_R, impl="bag")
    assert torch.equal(part, whole[2:4]), "any range of sums"


def test_rows_that_no_term_names_are_not_read() -> None:
    rows_RD = torch.full((4, 3), float("nan"))
    rows_RD[1] = 2.0
    assert sum_rows(rows_RD, torch.tensor([1]), torch.tensor([0, 1]), torch.ones(4)).tolist() == [[2.0] * 3]


def test_strides_do_not_matter() -> None:
    rows_RD, (terms_N, ends_S) = torch.randn(6, 4), terms_of([2, 3], 6)
    odd = rows_RD.t().contiguous().t()
    assert torch.equal(sum_rows(odd, terms_N, ends_S), sum_rows(rows_RD, terms_N, ends_S))
