"""Dispatch by Ascend's own operators: npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2.

Wins at decode: one operator quantises, sends and sorts, with no exchange of counts and no host synchronisation.
Inference only: the operators have no gradient, so under grad the dispatcher refuses and names the trainable path.
The group must carry nothing else, and a token's experts must differ (the operators' rules).

On A3 every call is padded to `max_tokens`, and a mask [T, K] marks the routes that exist: the operators want equal
token counts on all ranks wherever a mask is given, at least one token, and ids that are in range also where masked.
On A2 the mask has no routes, so all must exist (one host read checks it), and counts that differ go by global_bs.

Legend: T tokens here, B tokens of the call (T padded), K routes a token, D width, A rows at most here, R rows here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.coded_rows import check_coded_rows
from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.dispatchers.ascend_limits import (
    DEFAULT_WINDOW,
    AscendOptions,
    check_call,
    check_codec,
    check_group,
    check_window,
    refuse_grad,
)
from moeweave.comm.dispatchers.gathered import GatheredDispatcher
from moeweave.comm.layout import Layout
from moeweave.comm.pending import Pending
from moeweave.kernels_ext import npu, quantize_rows

DYNAMIC_INT8 = 2  # quant_mode
COUNTS = 1  # expert_token_nums_type


@dataclass(frozen=True, kw_only=True)
class AscendLayout(Layout):
    """What dispatch gives for combine; the operator keeps the order of rows to itself, so the moves are empty.

    Attributes:
        ids_BK: int32, in range everywhere.
        active_BK: bool, which routes exist; None on A2, where all do.
        assist_info, recv_counts, tp_counts, expand_scales: outputs of the dispatch operator, passed on unread.
        num_rows: A.
    """

    ids_BK: Tensor
    active_BK: Tensor | None
    assist_info: Tensor
    recv_counts: Tensor
    tp_counts: Tensor | None
    expand_scales: Tensor | None
    num_rows: int


class AscendDispatcher:
    """TokenDispatcher over the operators of torch-npu, forward only.

    Args:
        group: ranks that share the experts, of a backend whose group the operators know by `group_name`.
        num_experts: experts over the whole group, a multiple of its size.
        options: series, max_tokens.
        group_name: name of the group's HCCL communicator.
        window_mb: HCCL_BUFFSIZE of the process.
        call: runs an operator by name.
        codec: "none" or "int8": the operator's own quantisation, scale = amax / 127 of a token.
        coded_rows: dispatch hands over codes and scales as they came.

    Raises:
        ValueError: sizes that the series does not take; a window that is too small; another codec.
        RuntimeError: a call that would need a gradient.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        options: AscendOptions,
        *,
        group_name: str,
        window_mb: int = DEFAULT_WINDOW,
        call: npu.Call = npu.call,
        codec: Codec | None = None,
        coded_rows: bool = False,
    ) -> None:
        self.codec, self.coded_rows = codec or Codec(), coded_rows
        check_codec(self.codec)
        check_coded_rows(self.codec, coded_rows)
        self.comm, self.num_experts, self.options = Communicator(group), num_experts, options
        self.group_name, self.window_mb, self.call = group_name, window_mb, call
        check_group(options, self.comm.size, num_experts)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        """See `TokenDispatcher`; x_TD bf16 or fp16. A handle saves nothing here: the operator exchanges no counts."""
        refuse_grad(x_TD, weights_TK)
        self._check(x_TD, ids_TK)
        x_BD, ids_BK, active_BK = self._padded(x_TD, ids_TK)
        rows_AD, scales_A, assist, counts_e, recv_counts, tp_counts, expand_scales = self.call(
            "npu_moe_distribute_dispatch_v2",
            x=x_BD,
            expert_ids=ids_BK,
            **self._common(active_BK),
            expert_scales=weights_TK.float() if self._is_a2 else None,
            quant_mode=DYNAMIC_INT8 if self.codec.dispatch == "int8" else 0,
            expert_token_nums_type=COUNTS,
        )
        offsets_e = counts_e.cumsum(0).to(torch.int32)
        none = ids_BK.new_empty(0, dtype=torch.int64)
        layout = AscendLayout(
            order_N=none,
            send_splits=none,
            recv_splits=none,
            perm_R=none,
            offsets_e=offsets_e,
            num_tokens=x_TD.shape[0],
            top_k=ids_TK.shape[1],
            group=self.comm.name,
            ids_BK=ids_BK,
            active_BK=active_BK,
            assist_info=assist,
            recv_counts=recv_counts,
            tp_counts=tp_counts,
            expand_scales=expand_scales if self._is_a2 else None,
            num_rows=rows_AD.shape[0],
        )
        if self.codec.dispatch == "none":
            return Dispatched(rows_AD, None, None, offsets_e, layout)
        if self.coded_rows:
            return Dispatched(rows_AD, scales_A, None, offsets_e, layout)
        return Dispatched(quantize_rows.decode(rows_AD, scales_A[:, None], x_TD.dtype), None, None, offsets_e, layout)

    def combine(
        self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched, *, shared_TD: Tensor | None = None
    ) -> Tensor:
        """See `TokenDispatcher`; `shared_TD` (the shared expert's output, A3 only) is added in the operator."""
        refuse_grad(rows_RD, weights_TK)
        layout = dispatched.handle
        assert isinstance(layout, AscendLayout), "dispatched by another dispatcher"
        if shared_TD is not None and self._is_a2:
            raise ValueError("shared_TD (given) must be None on A2 for dispatcher='ascend'. Add it to the output.")
        num_padded = layout.ids_BK.shape[0]
        y_BD = self.call(
            "npu_moe_distribute_combine_v2",
            expand_x=_resized(rows_RD, layout.num_rows),
            expert_ids=layout.ids_BK,
            assist_info_for_combine=layout.assist_info,
            ep_send_counts=layout.recv_counts,
            expert_scales=_resized(weights_TK.float(), num_padded),
            **self._common(layout.active_BK),
            tp_send_counts=layout.tp_counts,
            expand_scales=layout.expand_scales,
            shared_expert_x=None if shared_TD is None else _resized(shared_TD, num_padded),
        )
        if layout.active_BK is None:
            return y_BD
        # What a token without any route gets is not documented: it is zero, or the shared expert's output.
        other_TD = y_BD.new_zeros(()) if shared_TD is None else shared_TD
        routed_T = layout.active_BK[: layout.num_tokens].any(1, keepdim=True)
        return torch.where(routed_T, y_BD[: layout.num_tokens], other_TD)

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        return Pending.ready(self.dispatch(x_TD, ids_TK, weights_TK, handle=handle))

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        return Pending.ready(self.combine(rows_RD, weights_TK, dispatched))

    @property
    def _is_a2(self) -> bool:
        return self.options.series == "A2"

    def _common(self, active_BK: Tensor | None) -> dict[str, object]:
        """Arguments that dispatch and combine must be given alike."""
        return dict(
            group_ep=self.group_name,
            ep_world_size=self.comm.size,
            ep_rank_id=self.comm.rank,
            moe_expert_num=self.num_experts,
            x_active_mask=active_BK,
            global_bs=self.options.max_tokens * self.comm.size,
            comm_alg="fullmesh" if self._is_a2 else "",
        )

    def _check(self, x_TD: Tensor, ids_TK: Tensor) -> None:
        sizes = x_TD.shape[1], ids_TK.shape[1], self.num_experts
        if x_TD.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"x.dtype ({x_TD.dtype}) must be bfloat16 or float16 for dispatcher='ascend'. "
                "Cast the model, or use dispatcher='alltoall'."
            )
        check_call(self.options, x_TD.shape[0], *sizes)
        check_window(self.options, self.window_mb, self.comm.size, *sizes)

    def _padded(self, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> tokens and int32 ids of the call, and which routes exist (None on A2)."""
        active_TK = (ids_TK >= 0) & (ids_TK < self.num_experts)
        if self._is_a2:
            if not bool(active_TK.all()):
                raise ValueError(
                    f"ids ({int((~active_TK).sum())} of them) must be 0 to {self.num_experts - 1} on A2 for "
                    "dispatcher='ascend': it has no mask of routes. Use dispatcher='alltoall'."
                )
            return x_TD, ids_TK.to(torch.int32), None
        most = self.options.max_tokens
        active_BK = _resized(active_TK, most)
        ids_BK = _resized(ids_TK, most)
        return _resized(x_TD, most), fill_routes(ids_BK, active_BK, self.num_experts).to(torch.int32), active_BK


def fill_routes(ids_BK: Tensor, active_BK: Tensor, num_experts: int) -> Tensor:
    """Give routes that do not exist the experts that their token does not use, in order: all ids of a token differ.

    Example, 4 experts: [2, -1, 0, -1] becomes [2, 1, 0, 3].
    """
    ids_BK = torch.where(active_BK, ids_BK, num_experts)
    used_BE = torch.zeros(ids_BK.shape[0], num_experts + 1, dtype=torch.int8, device=ids_BK.device)
    free_BE = torch.argsort(used_BE.scatter_(1, ids_BK, 1)[:, :num_experts], dim=1, stable=True)
    turn_BK = ((~active_BK).cumsum(1) - 1).clamp(min=0)
    return torch.where(active_BK, ids_BK, free_BE.gather(1, turn_BK))


def make_ascend(
    group: ProcessGroup | None,
    num_experts: int,
    options: AscendOptions,
    *,
    codec: Codec | None = None,
    coded_rows: bool = False,
) -> AscendDispatcher | GatheredDispatcher:
    """The dispatcher of `options.path` over an hccl group.

    Raises:
        ValueError: no group, or one of another backend; a codec that the operators do not have.
    """
    check_codec(codec or Codec())
    backend = "none, one rank" if group is None else dist.get_backend(group)
    if group is None or backend != "hccl":
        raise ValueError(
            f"the expert group's backend ({backend}) must be hccl for dispatcher='ascend': its operators run on NPUs. "
            "Use Mesh(device='npu') with ep > 1, or dispatcher='alltoall'."
        )
    if options.path == "gathered":
        return GatheredDispatcher(group, num_experts, options.max_tokens, codec=codec, coded_rows=coded_rows)
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())  # type: ignore[attr-defined]
    # HCCL's own variable: the operators have no other way to learn the size of their window.
    window_mb = int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_WINDOW))
    return AscendDispatcher(
        group, num_experts, options, group_name=name, window_mb=window_mb, codec=codec, coded_rows=coded_rows
    )


def _resized(rows: Tensor, size: int) -> Tensor:
    """The first `size` rows; zeros where there are fewer."""
    if rows.shape[0] >= size:
        return rows[:size]
    return torch.cat([rows, rows.new_zeros(size - rows.shape[0], *rows.shape[1:])])
