"""The way back of the three-stream schedule: results split over the two planes, and gradients over both as well.

    exact        a row a route comes back, and is weighted and summed where its token is
    prereduced   weighted sums of this rank's experts come back, one a token and rank, and are summed over ranks

Legend: T tokens here, K routes a token, D width, R rows here, W ranks, M = T_max of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from moeweave.comm.codec import Codec
from moeweave.comm.joins import GradientWay, JoinPrereduced, JoinReturned, Post, PostPrereduced
from moeweave.comm.layout import Layout
from moeweave.comm.transfer import from_words, to_words
from moeweave.comm.transfer_gathered import partial_sums
from moeweave.comm.two_planes import Planes


class WayBack:
    """Results home.

    Args:
        planes: what they go over. size: ranks. codec: formats of results and gradients.
        computing: a span of computation by name.
    """

    def __init__(
        self, planes: Planes, size: int, codec: Codec, computing: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        self.planes, self.size, self.codec, self.computing = planes, size, codec, computing

    def exact(self, rows_RD: Tensor, weights_TK: Tensor, layout: Layout) -> Tensor:
        """rows_RD by expert -> y_TD."""
        most = 0 if layout.max_tokens is None else int(layout.max_tokens) * layout.top_k
        way = self.gradient_way("results", "combine", most)
        token = Post.apply(rows_RD, way)
        rows = rows_RD.detach()[: layout.perm_R.shape[0]]
        arrival = torch.empty_like(rows, memory_format=torch.contiguous_format).index_copy_(0, layout.perm_R, rows)
        sends, receives = layout.send_splits.tolist(), layout.recv_splits.tolist()
        returned = self._exchange(arrival, receives, sends, most)
        with self.computing("sum"):
            return JoinReturned.apply(token, weights_TK, returned, layout, way)

    def prereduced(self, rows_RD: Tensor, weights_TK: Tensor, weights_R: Tensor, layout: Layout) -> Tensor:
        """The same by sums; `weights_R` are the weights where the rows are."""
        assert layout.route_R is not None and layout.max_tokens is not None
        most = int(layout.max_tokens)
        way = self.gradient_way("results", "combine", most)
        token = PostPrereduced.apply(rows_RD, weights_TK, weights_R, layout, way)
        partial = partial_sums(rows_RD.detach(), weights_R, layout.route_R, self.size * most, layout.top_k)
        summed = self.sum_of_ranks(partial, most, layout.num_tokens, rows_RD.dtype)
        return JoinPrereduced.apply(token, summed, layout, way)

    def sum_of_ranks(self, partial: Tensor, most: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Partial sums [W * M, D] of this rank's experts -> this rank's tokens' sums over ranks [T, D]."""
        blocks = [most] * self.size
        parts = self._exchange(partial.to(dtype), blocks, blocks, most)
        with self.computing("sum"):
            # By rank, in the wide dtype, so that the split over planes and the schedule change no bit.
            summed = parts.view(self.size, most, partial.shape[1]).to(partial.dtype).sum(0)
            return summed[:num_tokens].to(dtype)

    def gradient_way(self, name: str, exchange: str, most: int = 0) -> GradientWay:
        """For the gradients of what `exchange` ("dispatch" or "combine") moves; `most` as `Planes` has it."""
        coding = getattr(self.codec, f"{exchange}_backward"), self.codec.scale
        return GradientWay(self.planes, f"gradients of {name}", coding, most)

    def _exchange(self, rows: Tensor, sends: list[int], receives: list[int], most: int) -> Tensor:
        format, scale = self.codec.combine, self.codec.scale
        arrived = self.planes.all_to_all("results", to_words(rows, format, scale), sends, receives, most).wait()
        return from_words(arrived, format, scale, rows.shape[1], rows.dtype)
