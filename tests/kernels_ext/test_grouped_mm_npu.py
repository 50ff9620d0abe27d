"""The NPU's grouped product over an emulated operator, against the reference.

Letters: R rows, E groups, D columns in, F columns out.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moeweave.kernels_ext import npu
from moeweave.kernels_ext.grouped_mm import OP, npu_impl, reference
from moeweave.kernels_ext.registry import select
from moeweave.kernels_ext.tolerance import assert_close


def grouped_matmul(name: str, **given: Any) -> list[Tensor]:
    """npu_grouped_matmul as documented for one input and one weight: group_type 0 splits the rows of x, 2 the axis that
    is summed over; group_list holds ends. What no group covers is NaN, as is the product of an empty group."""
    assert (name, given["split_item"], given["group_list_type"]) == ("npu_grouped_matmul", 3, 0)
    (x,), (weight,), ends = given["x"], given["weight"], given["group_list"]
    assert ends.dtype == torch.int64
    spans = list(pairwise([0, *ends.tolist()]))
    if given["group_type"] == 0:
        out = torch.full((x.shape[0], weight.shape[2]), float("nan"), dtype=x.dtype)
        for group, (start, end) in enumerate(spans):
            out[start:end] = (x[start:end].float() @ weight[group].float()).to(x.dtype)
        return [out]
    products = [x[:, a:b].float() @ weight[a:b].float() + (float("nan") if a == b else 0.0) for a, b in spans]
    return [torch.stack(products).to(x.dtype)]


@pytest.mark.parametrize("ends", [[3, 9], [0, 9], [9, 9], [2, 5]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ends: list[int]) -> None:
    monkeypatch.setattr(npu, "call", grouped_matmul)
    torch.manual_seed(0)
    rows_RD, weight_EDF = torch.randn(9, 16).to(dtype), torch.randn(2, 16, 24).to(dtype)
    grad_RF, offsets_e = torch.randn(9, 24).to(dtype), torch.tensor(ends, dtype=torch.int32)
    last = ends[-1]
    got, want = (each.forward(rows_RD, weight_EDF, offsets_e)[:last] for each in (npu_impl, reference))
    assert_close("forward", got, want)
    got, want = (each.forward(grad_RF, weight_EDF.transpose(1, 2), offsets_e)[:last] for each in (npu_impl, reference))
    assert_close("gradient of the rows", got, want)
    got, want = (each.weight_grad(rows_RD, grad_RF, offsets_e) for each in (npu_impl, reference))
    assert_close("gradient of the weight", got, want)


def test_it_is_not_chosen_off_an_npu() -> None:
    rows = torch.zeros(2, 16, dtype=torch.bfloat16)
    assert select(OP, rows, rows).name != "npu"
    with pytest.raises(ValueError, match="npu: it is for npu, not cpu"):
        select(OP, rows, rows, impl="npu")
