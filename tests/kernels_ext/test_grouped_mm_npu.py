"""The NPU's grouped product over an emulated operator, against the reference.

Letters: R rows, E groups, D columns in, F columns out.
"""

from __future__ import annotations

import pytest
import torch

from moeweave.kernels_ext.grouped_mm import OP, npu_impl, reference
from moeweave.kernels_ext.registry import select
from moeweave.kernels_ext.tolerance import assert_close
from npu_local_emulator import an_npu


@pytest.mark.parametrize("ends", [[3, 9], [0, 9], [9, 9], [2, 5]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_reference(dtype: torch.dtype, ends: list[int]) -> None:
    torch.manual_seed(0)
    rows_RD, weight_EDF = torch.randn(9, 16).to(dtype), torch.randn(2, 16, 24).to(dtype)
    grad_RF, offsets_e = torch.randn(9, 24).to(dtype), torch.tensor(ends, dtype=torch.int32)
    last = ends[-1]
    with an_npu():
        got, want = (each.forward(rows_RD, weight_EDF, offsets_e)[:last] for each in (npu_impl, reference))
        assert_close("forward", got, want)
        got, want = (
            each.forward(grad_RF, weight_EDF.transpose(1, 2), offsets_e)[:last] for each in (npu_impl, reference)
        )
        assert_close("gradient of the rows", got, want)
        got, want = (each.weight_grad(rows_RD, grad_RF, offsets_e) for each in (npu_impl, reference))
        assert_close("gradient of the weight", got, want)


def test_it_is_not_chosen_off_an_npu() -> None:
    rows = torch.zeros(2, 16, dtype=torch.bfloat16)
    assert select(OP, rows, rows).name != "npu"
    with pytest.raises(ValueError, match="npu: it is for npu, not cpu"):
        select(OP, rows, rows, impl="npu")
