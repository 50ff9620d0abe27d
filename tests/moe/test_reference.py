"""The oracle itself: `moe_forward` against NumPy with hand-derived gradients, and those against differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeweave.kernels_ext.tolerance import assert_close
from moeweave.moe.reference import moe_forward
from numpy_oracle import Array, Experts, SoftmaxRouter

T, D, I, E, K = 7, 5, 3, 4, 2  # noqa: E741


def make_experts(rng: np.random.Generator) -> Experts:
    shapes = (E, I, D), (E, I, D), (E, D, I), (E, I), (E, I), (E, D)
    return Experts(*(rng.standard_normal(shape) for shape in shapes))


def make_routes(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, Array]:
    """Ids and weights [T, K], one token and one route not routed, and the same weights scattered to [T, E]."""
    ids = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    ids[2] = -1
    ids[4, 0] = -1
    weights = rng.standard_normal((T, K))
    w_TE = np.zeros((T, E))
    for t in range(T):
        for k in range(K):
            if ids[t, k] >= 0:
                w_TE[t, ids[t, k]] = weights[t, k]
    return torch.from_numpy(ids), torch.from_numpy(weights), w_TE


def packed(experts: Experts) -> list[torch.Tensor]:
    """gate_up [E, 2I, D], down, gate_up_bias, down_bias as torch parameters."""
    arrays = (
        np.concatenate([experts.gate_EID, experts.up_EID], 1),
        experts.down_EDI,
        np.concatenate([experts.gate_bias_EI, experts.up_bias_EI], 1),
        experts.down_bias_ED,
    )
    return [torch.from_numpy(array.copy()).requires_grad_() for array in arrays]


def test_forward_and_gradients_equal_the_numpy_oracle() -> None:
    rng = np.random.default_rng(0)
    experts, x, d_y = make_experts(rng), rng.standard_normal((T, D)), rng.standard_normal((T, D))
    ids_TK, weights_TK, w_TE = make_routes(rng)
    weights_TK.requires_grad_()
    x_TD = torch.from_numpy(x).requires_grad_()
    params = packed(experts)

    y_TD = moe_forward(x_TD, ids_TK, weights_TK, *params[:2], up_bias_EF=params[2], down_bias_ED=params[3])
    grads = torch.autograd.grad(y_TD, (x_TD, weights_TK, *params), torch.from_numpy(d_y))

    assert_close("y", y_TD, torch.from_numpy(experts.forward(x, w_TE)))
    want = experts.backward(d_y)
    routed = np.where(ids_TK.numpy() >= 0, np.take_along_axis(want["w"], ids_TK.numpy().clip(0), 1), 0.0)
    stacked = {"gate_up": np.concatenate([want["gate"], want["up"]], 1), "down": want["down"]}
    stacked |= {"up_bias": np.concatenate([want["gate_bias"], want["up_bias"]], 1), "down_bias": want["down_bias"]}
    for name, got, array in zip(("x", "w", *stacked), grads, (want["x"], routed, *stacked.values()), strict=True):
        assert_close(f"gradient of {name}", got, torch.from_numpy(array))


def difference(loss, array: Array, index: tuple[int, ...], step: float = 1e-6) -> float:
    """Central difference of `loss()` in one entry of `array`."""
    kept = array[index]
    array[index] = kept + step
    above = loss()
    array[index] = kept - step
    below = loss()
    array[index] = kept
    return (above - below) / (2 * step)


def test_hand_derived_gradients_of_the_experts_equal_differences() -> None:
    rng = np.random.default_rng(1)
    experts, x, d_y = make_experts(rng), rng.standard_normal((T, D)), rng.standard_normal((T, D))
    w_TE = rng.standard_normal((T, E))
    arrays = {
        "x": x,
        "w": w_TE,
        "gate": experts.gate_EID,
        "up": experts.up_EID,
        "down": experts.down_EDI,
        "gate_bias": experts.gate_bias_EI,
        "up_bias": experts.up_bias_EI,
        "down_bias": experts.down_bias_ED,
    }
    experts.forward(x, w_TE)
    grads = experts.backward(d_y)
    for name, array in arrays.items():
        for index in (np.unravel_index(flat, array.shape) for flat in rng.integers(array.size, size=6)):
            numeric = difference(lambda: float((experts.forward(x, w_TE) * d_y).sum()), array, index)
            assert grads[name][index] == pytest.approx(numeric, rel=1e-6, abs=1e-7), (name, index)


def test_hand_derived_gradients_of_the_router_equal_differences() -> None:
    rng = np.random.default_rng(2)
    router = SoftmaxRouter(rng.standard_normal((E, D)), K, aux_coef=0.3, z_coef=0.2)
    x, d_w = rng.standard_normal((T, D)), rng.standard_normal((T, E))

    def loss() -> float:
        w_TE, aux, z = router.forward(x)
        return float((w_TE * d_w).sum()) + 0.3 * aux + 0.2 * z

    loss()
    d_x, d_weight = router.backward(d_w)
    for array, grad in ((x, d_x), (router.weight_ED, d_weight)):
        for index in np.ndindex(array.shape):
            assert grad[index] == pytest.approx(difference(loss, array, index), rel=1e-6, abs=1e-8), index


def test_worked_example() -> None:
    up, down = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[1.0]], [[10.0]]])
    ids, weights = torch.tensor([[1, 0]]), torch.tensor([[0.5, 2.0]])
    y = moe_forward(torch.tensor([[3.0]]), ids, weights, up, down, activation=torch.relu, gated=False)
    assert y.tolist() == [[36.0]]


def test_no_token_gives_no_row() -> None:
    ids = torch.empty(0, 2, dtype=torch.int64)
    y = moe_forward(torch.empty(0, 5), ids, torch.empty(0, 2), torch.ones(3, 4, 5), torch.ones(3, 5, 2))
    assert y.shape == (0, 5)
