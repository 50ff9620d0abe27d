"""A second opinion on the reference: MoE layers in NumPy, float64, with gradients derived by hand.

Independent of torch and of `reference.py`: dense over experts (a mask instead of gathered routes), no autograd.

Legend: T tokens, D width, E experts, K chosen ones, I hidden width; d_x is the gradient of the loss in x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x: Array) -> Array:
    exps = np.exp(x - x.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


@dataclass
class Experts:
    """SwiGLU experts: out = down (silu(gate x + bg) * (up x + bu)) + bd, weighted by w_TE (0 where not routed)."""

    gate_EID: Array
    up_EID: Array
    down_EDI: Array
    gate_bias_EI: Array
    up_bias_EI: Array
    down_bias_ED: Array

    def forward(self, x_TD: Array, w_TE: Array) -> Array:
        self.x_TD, self.w_TE = x_TD, w_TE
        self.g_TEI = np.einsum("td,eid->tei", x_TD, self.gate_EID) + self.gate_bias_EI
        self.u_TEI = np.einsum("td,eid->tei", x_TD, self.up_EID) + self.up_bias_EI
        self.s_TEI = sigmoid(self.g_TEI)
        self.h_TEI = self.g_TEI * self.s_TEI * self.u_TEI
        self.o_TED = np.einsum("tei,edi->ted", self.h_TEI, self.down_EDI) + self.down_bias_ED
        return np.einsum("te,ted->td", w_TE, self.o_TED)

    def backward(self, d_y_TD: Array) -> dict[str, Array]:
        """silu(g) = g s with s = sigmoid(g), and s' = s (1 - s), so silu'(g) = s + g s (1 - s) = s (1 + g (1 - s))."""
        d_o_TED = self.w_TE[:, :, None] * d_y_TD[:, None, :]
        d_h_TEI = np.einsum("ted,edi->tei", d_o_TED, self.down_EDI)
        d_u_TEI = d_h_TEI * self.g_TEI * self.s_TEI
        d_g_TEI = d_h_TEI * self.u_TEI * self.s_TEI * (1.0 + self.g_TEI * (1.0 - self.s_TEI))
        return {
            "w": np.einsum("td,ted->te", d_y_TD, self.o_TED),
            "x": np.einsum("tei,eid->td", d_g_TEI, self.gate_EID) + np.einsum("tei,eid->td", d_u_TEI, self.up_EID),
            "gate": np.einsum("tei,td->eid", d_g_TEI, self.x_TD),
            "up": np.einsum("tei,td->eid", d_u_TEI, self.x_TD),
            "down": np.einsum("ted,tei->edi", d_o_TED, self.h_TEI),
            "gate_bias": d_g_TEI.sum(0),
            "up_bias": d_u_TEI.sum(0),
            "down_bias": d_o_TED.sum(0),
        }


@dataclass
class SoftmaxRouter:
    """Softmax over all experts, the K largest, renormalised; with the balance losses on its logits."""

    weight_ED: Array
    top_k: int
    aux_coef: float
    z_coef: float

    def forward(self, x_TD: Array) -> tuple[Array, float, float]:
        """Returns w_TE (0 where not chosen), the auxiliary loss and the z-loss."""
        self.x_TD = x_TD
        self.logits_TE = x_TD @ self.weight_ED.T
        self.p_TE = softmax(self.logits_TE)
        chosen = np.argsort(-self.p_TE, axis=1, kind="stable")[:, : self.top_k]
        self.mask_TE = np.zeros_like(self.p_TE)
        np.put_along_axis(self.mask_TE, chosen, 1.0, axis=1)
        self.sum_T1 = (self.p_TE * self.mask_TE).sum(1, keepdims=True)
        self.share_E = self.mask_TE.sum(0) / self.mask_TE.sum()
        self.lse_T = np.log(np.exp(self.logits_TE).sum(1))
        aux = self.p_TE.shape[1] * float(self.share_E @ self.p_TE.mean(0))
        return self.p_TE * self.mask_TE / self.sum_T1, aux, float(np.mean(self.lse_T**2))

    def backward(self, d_w_TE: Array) -> tuple[Array, Array]:
        """Returns d_x_TD and d_weight_ED.

        w_i = p_i / S over the chosen, S their sum: dL/dp_i = (d_i - sum_j d_j w_j) / S for chosen i, 0 elsewhere.
        aux = E sum_e f_e mean_t p_te with f constant: dL/dp_te += coef E f_e / T.
        softmax: dL/dz = p (d_p - sum_j p_j d_p_j).  z-loss: d mean(lse^2)/dz_te = 2 lse_t p_te / T.
        """
        num_tokens, num_experts = self.p_TE.shape
        w_TE = self.p_TE * self.mask_TE / self.sum_T1
        inner_T1 = (d_w_TE * w_TE).sum(1, keepdims=True)
        d_p_TE = self.mask_TE * (d_w_TE - inner_T1) / self.sum_T1
        d_p_TE = d_p_TE + self.aux_coef * num_experts * self.share_E / num_tokens
        d_z_TE = self.p_TE * (d_p_TE - (self.p_TE * d_p_TE).sum(1, keepdims=True))
        d_z_TE = d_z_TE + self.z_coef * 2.0 * self.lse_T[:, None] * self.p_TE / num_tokens
        return d_z_TE @ self.weight_ED, d_z_TE.T @ self.x_TD
