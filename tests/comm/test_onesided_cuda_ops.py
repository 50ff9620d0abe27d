"""The CUDA operators as torch.compile sees them: shapes and gradients of their fake kernels, which need no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moeweave.comm import engines_cuda
from moeweave.comm.onesided_cuda_ops import CudaSettings, cuda_combine, cuda_dispatch, cuda_resend
from moeweave.comm.windows_cuda import WindowMap

WINDOW = WindowMap(size=4, num_experts=16, top_k=3, max_tokens=10, row_bytes=32, back_bytes=32)
SETTINGS = CudaSettings("stub", exact=False)


class StubEngine:
    """All that a fake kernel asks of an engine."""

    map = WINDOW


@pytest.fixture
def stub() -> Iterator[None]:
    engine = StubEngine()
    engines_cuda._NAMED["stub"] = engine
    yield
    del engines_cuda._NAMED["stub"]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x_TD = torch.empty(7, 16, dtype=torch.bfloat16, requires_grad=True)
    return x_TD, torch.empty(7, 3, dtype=torch.int64), torch.empty(7, 3, requires_grad=True)


@pytest.mark.usefixtures("stub")
def test_shapes_with_a_capacity() -> None:
    with FakeTensorMode():
        x_TD, ids_TK, weights_TK = inputs()
        rows, weights, *moves = cuda_dispatch(x_TD, ids_TK, weights_TK, 40, 1, *SETTINGS)
        assert (rows.shape, rows.dtype, weights.shape) == ((40, 16), torch.bfloat16, (40,))
        assert [tuple(each.shape) for each in moves] == [(7, 3), (4, 10, 3), (4, 10), (4, 10), (4,)]
        assert {each.dtype for each in moves} == {torch.int32}
        again, _ = cuda_resend(x_TD, weights_TK, [ids_TK, *moves], 40, *SETTINGS)
        assert again.shape == rows.shape


@pytest.mark.usefixtures("stub")
def test_without_a_capacity_the_number_of_rows_is_unknown() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        rows, weights, *_ = cuda_dispatch(*inputs(), -1, 1, *SETTINGS)
        assert isinstance(rows.shape[0], torch.SymInt)
        assert rows.shape[1] == 16
        assert isinstance(weights.shape[0], torch.SymInt)


@pytest.mark.usefixtures("stub")
def test_gradients_reach_tokens_and_weights() -> None:
    with FakeTensorMode():
        x_TD, ids_TK, weights_TK = inputs()
        rows, weights_R, *moves = cuda_dispatch(x_TD, ids_TK, weights_TK.detach(), 40, 1, *SETTINGS)
        y_TD = cuda_combine(rows * 2, weights_TK, weights_R, [ids_TK, *moves], *SETTINGS)
        assert y_TD.shape == (7, 16)
        y_TD.sum().backward()
        assert x_TD.grad is not None and x_TD.grad.shape == (7, 16)
        assert weights_TK.grad is not None and weights_TK.grad.dtype == torch.float32


def test_an_engine_that_is_gone_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"engine \('gone'\) must be open"):
        engines_cuda.cuda_engine_named("gone")
