"""Dispatch by an all-gather of fixed size: every rank's tokens, ids and weights to every rank; no host reads them.

The gathered path of Ascend: rows are quantised before they leave, `npu_moe_init_routing_v2` picks those of this rank's
experts, `npu_moe_token_unpermute` sums, a reduce-scatter brings one row a token home. Wins over the dispatch operators
where a token needs most ranks, and where these do not run (A2 across servers, sizes out of their range). It works on
any device, in plain PyTorch where there is no operator. Inference only.

Legend: T tokens here, B = max_tokens, W ranks, N = W * B tokens of all, K routes a token, D width, R = N * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.coded_rows import check_coded_rows
from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.dispatchers.ascend_limits import check_codec, refuse_grad
from moeweave.comm.layout import Layout
from moeweave.comm.pending import Pending
from moeweave.kernels_ext import expand_rows, quantize_rows


@dataclass(frozen=True, kw_only=True)
class GatheredLayout(Layout):
    """What dispatch gives for combine; the moves are empty.

    Attributes:
        expanded: where each route's row is.
        weights_NK: float32, of all ranks' tokens. here_NK: bool, the routes that have a row here.
    """

    expanded: expand_rows.Expanded
    weights_NK: Tensor
    here_NK: Tensor


class GatheredDispatcher:
    """TokenDispatcher of fixed sizes, forward only.

    Args:
        group: ranks that share the experts, None for this rank alone.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        max_tokens: tokens of a rank at most, to which every call is padded.
        codec: "none" or "int8" of what dispatch sends.
        coded_rows: dispatch hands over codes and scales as they came.

    Raises:
        ValueError: more tokens than max_tokens; another codec. RuntimeError: a call that would need a gradient.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        num_experts: int,
        max_tokens: int,
        *,
        codec: Codec | None = None,
        coded_rows: bool = False,
    ) -> None:
        self.comm, self.num_experts, self.max_tokens = Communicator(group), num_experts, max_tokens
        self.codec, self.coded_rows = codec or Codec(), coded_rows
        check_codec(self.codec)
        check_coded_rows(self.codec, coded_rows)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        """See `TokenDispatcher`. A handle saves nothing here: no counts are exchanged."""
        refuse_grad(x_TD, weights_TK)
        if x_TD.shape[0] > self.max_tokens:
            raise ValueError(
                f"tokens of this rank ({x_TD.shape[0]}) must be at most {self.max_tokens}. Raise max_tokens."
            )
        quantised = self.codec.dispatch == "int8"
        sent, scales_T1 = quantize_rows.encode(x_TD, "int8") if quantised else (x_TD, None)
        x_ND, ids_NK, weights_NK = self._all(sent), self._all(ids_TK, -1), self._all(weights_TK.float())
        scales_N = None if scales_T1 is None else self._all(scales_T1).squeeze(1)
        num_local = self.num_experts // self.comm.size
        first, end = self.comm.rank * num_local, (self.comm.rank + 1) * num_local
        expanded = expand_rows.expand(x_ND, scales_N, ids_NK, (first, end), self.num_experts)
        none = ids_TK.new_empty(0, dtype=torch.int64)
        layout = GatheredLayout(
            order_N=none,
            send_splits=none,
            recv_splits=none,
            perm_R=none,
            offsets_e=expanded.offsets_e,
            num_tokens=x_TD.shape[0],
            top_k=ids_TK.shape[1],
            group=self.comm.name,
            expanded=expanded,
            weights_NK=weights_NK,
            here_NK=(ids_NK >= first) & (ids_NK < end),
        )
        rows_RD, scales_R = expanded.rows_RD, expanded.scales_R
        if scales_R is not None and not self.coded_rows:
            rows_RD, scales_R = quantize_rows.decode(rows_RD, scales_R[:, None], x_TD.dtype), None
        return Dispatched(rows_RD, scales_R, None, expanded.offsets_e, layout)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """See `TokenDispatcher`: a row a token and rank comes back, rounded once more than exact sums."""
        refuse_grad(rows_RD, weights_TK)
        layout = dispatched.handle
        assert isinstance(layout, GatheredLayout), "dispatched by another dispatcher"
        rows_RD = rows_RD[: layout.here_NK.numel()]
        part_ND = expand_rows.reduce(rows_RD, layout.expanded, layout.weights_NK, layout.here_NK)
        summed_BD = self.comm.reduce_scatter(part_ND.view(self.comm.size, self.max_tokens, -1))
        return summed_BD[: layout.num_tokens]

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        return Pending.ready(self.dispatch(x_TD, ids_TK, weights_TK, handle=handle))

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        return Pending.ready(self.combine(rows_RD, weights_TK, dispatched))

    def _all(self, part: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] of this rank -> [N, ...] of all, filled up."""
        padded = part.new_full((self.max_tokens, *part.shape[1:]), fill)
        padded[: part.shape[0]] = part
        return self.comm.all_gather(padded).flatten(0, 1)
