"""The measures of error, on numbers that can be checked by eye."""

from __future__ import annotations

import math

import pytest
import torch

from moeweave.kernels_ext.tolerance import TOLERANCE, assert_close, relative_error, sqnr


def test_relative_error_is_the_ratio_of_norms() -> None:
    got, want = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 2.0])
    assert relative_error(got, want) == pytest.approx(1 / math.sqrt(8))
    assert sqnr(got, want) == pytest.approx(10 * math.log10(8))


def test_nothing_against_nothing_is_no_error() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0.0
    assert sqnr(torch.ones(2), torch.ones(2)) == math.inf


@pytest.mark.parametrize("got", [[1.0, math.nan], [1.0, math.inf]])
def test_a_value_that_is_not_finite_is_infinitely_wrong(got: list[float]) -> None:
    assert relative_error(torch.tensor(got), torch.ones(2)) == math.inf
    assert sqnr(torch.tensor(got), torch.ones(2)) == -math.inf
    with pytest.raises(AssertionError, match="inf exceeds"):
        assert_close("y", torch.tensor(got), torch.ones(2))


def test_something_against_nothing_is_infinitely_wrong() -> None:
    assert relative_error(torch.tensor([1e-30]), torch.zeros(1)) == math.inf


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_assert_close_draws_the_line_at_the_table(dtype: torch.dtype) -> None:
    want = torch.ones(4, dtype=torch.float64)
    assert_close("y", want * (1 + 0.9 * TOLERANCE[dtype]), want, dtype)
    with pytest.raises(AssertionError, match="y: relative RMS error"):
        assert_close("y", want * (1 + 1.1 * TOLERANCE[dtype]), want, dtype)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"got\.shape \(2,\) must be want\.shape \(2, 1\)"):
        relative_error(torch.ones(2), torch.ones(2, 1))
