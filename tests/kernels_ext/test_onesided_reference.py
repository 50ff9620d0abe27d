"""The reference of the one-sided kernels against loops over tokens, and against the worked example of its docstring."""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.kernels_ext.onesided import reference
from moeweave.kernels_ext.tolerance import assert_close

WORLD, EXPERTS, TOP_K, WIDTH = 3, 6, 2, 4


def inputs() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(2)
    tokens = (4, 0, 5)
    xs = [torch.randn(t, WIDTH, generator=g) for t in tokens]
    ids = [torch.rand(t, EXPERTS, generator=g).topk(TOP_K).indices for t in tokens]
    ids[0][1, 0], ids[2][3] = -1, EXPERTS
    return xs, ids, [torch.rand(t, TOP_K, generator=g) for t in tokens]


def test_worked_example() -> None:
    rows, ends = reference.rows_of_routes([torch.tensor([[1, 0]]), torch.tensor([[0, -1]])], 2, 0)
    assert rows.tolist() == [[-1, 0], [1, -1]]
    assert ends.tolist() == [2]


def test_rows_come_by_expert_then_source_then_route() -> None:
    xs, ids, weights = inputs()
    for rank in range(WORLD):
        want, want_weights, ends = [], [], []
        for expert in (2 * rank, 2 * rank + 1):
            for source in range(WORLD):
                for t, k in (ids[source] == expert).nonzero().tolist():
                    want.append(xs[source][t])
                    want_weights.append(weights[source][t, k])
            ends.append(len(want))
        rows, weights_R, ends_e = reference.dispatch(xs, ids, weights, EXPERTS, rank)
        assert torch.equal(rows, torch.stack(want))
        assert torch.equal(weights_R, torch.stack(want_weights))
        assert ends_e.tolist() == ends


def test_combines_and_gradients_are_those_of_one_graph() -> None:
    xs, ids, weights = inputs()
    arrived = [reference.dispatch(xs, ids, weights, EXPERTS, rank) for rank in range(WORLD)]
    rows, weights_R = [rows * 3 for rows, _, _ in arrived], [w for _, w, _ in arrived]
    leaves = [w.clone().requires_grad_() for w in weights]
    routed = [((each >= 0) & (each < EXPERTS)).float() for each in ids]
    want = [(3 * x[:, None] * (w * r)[..., None]).sum(1) for x, w, r in zip(xs, leaves, routed, strict=True)]
    prereduced = reference.combine(rows, weights_R, ids, EXPERTS)
    exact = reference.combine_exact(rows, weights, ids, EXPERTS)
    grads = [torch.ones_like(x) for x in xs]
    sum(y.sum() for y in want).backward()
    _, grad_weights = reference.gradients(grads, rows, weights_R, ids, EXPERTS)
    for rank in range(WORLD):
        assert_close("prereduced", prereduced[rank], want[rank].detach())
        assert_close("exact", exact[rank], want[rank].detach())
        assert_close("weights' gradient", grad_weights[rank], leaves[rank].grad)
