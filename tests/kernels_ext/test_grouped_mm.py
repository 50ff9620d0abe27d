"""Grouped matrix product against a masked dense product in float64, forward and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeweave.kernels_ext.grouped_mm import OP, grouped_mm
from moeweave.kernels_ext.registry import select
from moeweave.kernels_ext.tolerance import assert_close

CPU = "cpu"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
BY_NAME = {implementation.name: implementation for implementation in OP.implementations}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (rows of each group, undefined rows after them)
CASES = {
    "odd": ([20, 0, 42, 1], 0),
    "tail": ([5, 3, 0, 9], 4),
    "one": ([0, 1, 0, 0], 0),
    "none": ([0, 0, 0, 0], 0),
    "only_tail": ([0, 0, 0, 0], 3),
    "hot": ([0, 0, 64, 0], 0),
}


def make(counts: list[int], tail: int, dtype: torch.dtype, D: int, F: int, device: str = CPU) -> tuple[Tensor, ...]:
    """Rows (NaN past the end), weight [E, D, F], offsets and the output's gradient (NaN past the end)."""
    num_rows = sum(counts)
    nan = torch.full((tail, max(D, F)), float("nan"))
    rows = torch.cat([torch.randn(num_rows, D), nan[:, :D]])
    grad = torch.cat([torch.randn(num_rows, F), nan[:, :F]])
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    weight = torch.randn(len(counts), D, F) / D**0.5
    return rows.to(device, dtype), weight.to(device, dtype), offsets.to(device), grad.to(device, dtype)


def expect(rows: Tensor, weight: Tensor, offsets: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of rows and weight in float64, by a dense product for every group and a mask."""
    rows, weight, grad = (x.detach().cpu().double().nan_to_num() for x in (rows, weight, grad))
    starts = [0, *offsets.tolist()]
    mask_RE = torch.zeros(rows.shape[0], weight.shape[0], dtype=torch.float64)
    for group, (start, end) in enumerate(itertools.pairwise(starts)):
        mask_RE[start:end, group] = 1.0
    rows.requires_grad_()
    weight.requires_grad_()
    out = torch.einsum("rd,edf,re->rf", rows, weight, mask_RE)
    return out.detach(), *torch.autograd.grad(out, (rows, weight), grad)


def run(rows: Tensor, weight: Tensor, offsets: Tensor, grad: Tensor, **options: bool) -> tuple[Tensor, ...]:
    """Output and gradients of rows and weight."""
    rows.requires_grad_()
    weight.requires_grad_()
    out = grouped_mm(rows, weight, offsets, **options)
    return out, *torch.autograd.grad(out, (rows, weight), grad)


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "rows' gradient", "weight's gradient"), got, want, strict=True):
        assert_close(name, a, b, dtype)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("out_in", [True, False], ids=["EFD", "EDF"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["auto", *BY_NAME])
def test_forward_and_gradients(impl: str, dtype: torch.dtype, out_in: bool, case: str, device: str) -> None:
    rows, weight, offsets, grad = make(*CASES[case], dtype, 32, 48, device)
    if impl != "auto" and (reason := BY_NAME[impl].supports(rows, weight)):
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot run grouped_mm"):
            grouped_mm(rows, weight, offsets, impl=impl)
        assert reason
        return
    stored = weight.transpose(-2, -1).contiguous() if out_in else weight.clone()
    rows.requires_grad_()
    stored.requires_grad_()
    out = grouped_mm(rows, stored.transpose(-2, -1) if out_in else stored, offsets, impl=impl)
    grad_rows, grad_stored = torch.autograd.grad(out, (rows, stored), grad)

    got_weight = grad_stored.transpose(-2, -1) if out_in else grad_stored
    check((out, grad_rows, got_weight), expect(rows, weight, offsets, grad), dtype)
    assert grad_stored.is_contiguous()
    end = int(offsets[-1])
    assert not out[end:].any()
    assert not grad_rows[end:].any()


@pytest.mark.parametrize("D, F", [(30, 48), (32, 46), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_strides_that_torch_refuses_fall_back(dtype: torch.dtype, D: int, F: int) -> None:
    rows, weight, offsets, grad = make([4, 0, 9], 2, dtype, D, F)
    with pytest.raises(ValueError, match="16 bytes"):
        select(OP, rows, weight, impl="torch")
    check(run(rows, weight, offsets, grad), expect(rows, weight, offsets, grad), dtype)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_with_gaps_and_expanded_gradients(dtype: torch.dtype, device: str) -> None:
    rows, weight, offsets, _ = make([4, 0, 9], 0, dtype, 32, 48, device)
    wide_rows, wide_weight = torch.cat([rows, rows], 1)[:, 1:33], weight.repeat(1, 2, 1)[:, ::2]
    wide_rows.requires_grad_()
    wide_weight.requires_grad_()
    out = grouped_mm(wide_rows, wide_weight, offsets)
    got = (out, *torch.autograd.grad(out.sum(), (wide_rows, wide_weight)))
    check(got, expect(wide_rows, wide_weight, offsets, torch.ones_like(out)), dtype)


@pytest.mark.usefixtures("nan_empty")
def test_exact_gives_the_same_bits() -> None:
    rows, weight, offsets, grad = make([20, 0, 43], 0, torch.float32, 32, 48)
    results = [run(rows, weight, offsets, grad, exact=exact) for exact in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("frozen", ["rows", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    rows, weight, offsets, grad = make([3, 4], 1, torch.float32, 16, 16)
    (weight if frozen == "rows" else rows).requires_grad_()
    grouped_mm(rows, weight, offsets).backward(grad)
    want = expect(rows, weight, offsets, grad)
    got = weight.grad if frozen == "rows" else rows.grad
    assert_close("gradient", got, want[2] if frozen == "rows" else want[1])
    assert (rows if frozen == "rows" else weight).grad is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))
def test_any_sizes(counts: list[int], tail: int, D: int, F: int) -> None:
    rows, weight, offsets, grad = make(counts, tail, torch.float64, D, F)
    check(run(rows, weight, offsets, grad), expect(rows, weight, offsets, grad), torch.float64)


def test_no_groups_is_no_output() -> None:
    out = grouped_mm(torch.ones(3, 4), torch.ones(0, 4, 5), torch.zeros(0, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(3, 5))


def test_compiles_to_one_graph_with_the_same_bits() -> None:
    rows, weight, offsets, grad = make([20, 0, 41], 3, torch.float32, 32, 48)
    want = run(rows, weight, offsets, grad)
    out = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")(rows, weight, offsets)
    got = (out, *torch.autograd.grad(out, (rows, weight), grad))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_shapes_flow_on_meta() -> None:
    rows, weight = torch.empty(6, 32, device="meta", requires_grad=True), torch.empty(4, 48, 32, device="meta")
    out = grouped_mm(rows, weight.transpose(-2, -1), torch.empty(4, dtype=torch.int32, device="meta"))
    assert out.shape == (6, 48)
    assert torch.autograd.grad(out.sum(), rows)[0].shape == rows.shape


@pytest.mark.parametrize(
    "rows, weight, offsets, message",
    [
        ((3, 4), (2, 5, 6), (torch.int32, 2), r"rows \(3, 4\) must be \[R, D\] and weight \(2, 5, 6\)"),
        ((3, 4), (4, 6), (torch.int32, 2), r"weight \(4, 6\) \[E, D, F\]"),
        ((3, 4), (2, 4, 6), (torch.int64, 2), r"offsets \(torch.int64.* must be int32"),
        ((3, 4), (2, 4, 6), (torch.int32, 3), r"must be int32 \[E\], E = 2"),
    ],
)
def test_what_does_not_fit_is_refused(rows: tuple, weight: tuple, offsets: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_mm(torch.ones(rows), torch.ones(weight), torch.zeros(offsets[1], dtype=offsets[0]))


def test_two_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \(torch.float32\) and weight \(torch.bfloat16\) must have one dtype"):
        grouped_mm(torch.ones(3, 4), torch.ones(2, 4, 4).bfloat16(), torch.tensor([1, 3], dtype=torch.int32))
