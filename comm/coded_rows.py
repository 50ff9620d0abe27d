"""Rows that reach the experts as they came over the link: codes and their scales, for a low-precision grouped product.

For inference: nothing here has a gradient, and what would need one is refused.

Legend: T tokens here, D width, R rows here, W words of 8 bytes in a wire row, G scales of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeweave.comm.codec import Codec, split_wire
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.layout import Layout
from moeweave.comm.transfer import to_words


def check_coded_rows(codec: Codec, coded_rows: bool) -> None:
    """Raise ValueError where coded rows are wanted of a dispatch that codes nothing."""
    if coded_rows and codec.dispatch == "none":
        raise ValueError(
            "coded_rows (True) must go with a coded dispatch, codec.dispatch is 'none'. "
            "Set codec='fp8', or leave coded_rows out."
        )


def coded_words(x_TD: Tensor, codec: Codec) -> Tensor:
    """Tokens [T, D] -> int64 words [T, W] of their wire rows. Raises RuntimeError where x_TD wants a gradient."""
    if torch.is_grad_enabled() and x_TD.requires_grad:
        raise RuntimeError(
            "x.requires_grad (True) must be False with coded_rows=True: codes have no gradient. "
            "Run under torch.no_grad(), or leave coded_rows out."
        )
    return to_words(x_TD, codec.dispatch, codec.scale)


def coded(words_RW: Tensor, codec: Codec, width: int, layout: Layout, weights_R: Tensor | None = None) -> Dispatched:
    """Words that arrived -> codes [R, D], and scales: [R] a token, [R, G] a group."""
    codes_RD, scales_RG = split_wire(words_RW.view(torch.uint8), codec.dispatch, codec.scale, width)
    scales = scales_RG.squeeze(1) if codec.scale == "token" else scales_RG
    return Dispatched(codes_RD, scales, weights_R, layout.offsets_e, layout)
