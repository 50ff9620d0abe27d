"""The oracle of every test: routed experts as two plain loops, over tokens and over their routes.

Slow on purpose, one token at a time, no sorting, no packing tricks; gradients come from autograd. Any dtype.

Legend: T tokens, K routes a token, D width, I hidden width of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def moe_forward(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up_EFD: Tensor,
    down_EDI: Tensor,
    *,
    up_bias_EF: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = nn.functional.silu,
    gated: bool = True,
) -> Tensor:
    """Return y_TD with ``y[t] = sum_k weights[t, k] * expert(ids[t, k])(x[t])`` in increasing k.

    One token [3.0], ids [1, 0], weights [0.5, 2.0], ungated ReLU experts with up [[1]], [[2]] and down [[1]], [[10]]
    give 0.5 * 10 * 6 + 2 * 1 * 3 = 36.

    x_TD: [T, D]. ids_TK: [T, K] int64; an id outside [0, E) is not routed. weights_TK: [T, K].
    up_EFD: F = 2I rows, the gate's first, if gated, else F = I. down_EDI: [E, D, I].
    """
    num_experts = down_EDI.shape[0]
    outputs = []
    for t in range(x_TD.shape[0]):
        y_D = x_TD[t] * 0.0
        for k in range(ids_TK.shape[1]):
            e = int(ids_TK[t, k])
            if not 0 <= e < num_experts:
                continue
            h_F = up_EFD[e] @ x_TD[t]
            if up_bias_EF is not None:
                h_F = h_F + up_bias_EF[e]
            if gated:
                gate_I, up_I = h_F.tensor_split(2)
                h_I = activation(gate_I) * up_I
            else:
                h_I = activation(h_F)
            out_D = down_EDI[e] @ h_I
            if down_bias_ED is not None:
                out_D = out_D + down_bias_ED[e]
            y_D = y_D + weights_TK[t, k] * out_D
        outputs.append(y_D)
    return torch.stack(outputs) if outputs else x_TD * 0.0
