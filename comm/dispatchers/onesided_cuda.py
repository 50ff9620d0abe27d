"""Dispatch by one-sided writes between NVIDIA GPUs of one scale-up domain: one kernel a dispatch, one a combine.

Each token goes once to each rank that needs it, straight into that rank's window, and is expanded there to expert-major
order as it arrives. With a capacity there is no host synchronisation, and both kernels can be captured in a CUDA graph.
Needs neither nvcc nor a C compiler (kernels_ext/nvrtc.py).

Windows are allocated at the first dispatch, which is a collective. The asynchronous forms run on a stream of the
engine; kernels of one engine run in the order of the calls, the same on all ranks.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.codec import Codec, wire_width
from moeweave.comm.coded_rows import check_coded_rows
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.engines_cuda import cuda_engine_of
from moeweave.comm.layout import Layout
from moeweave.comm.onesided_cuda import CudaEngine, CudaMoves
from moeweave.comm.onesided_cuda_ops import (
    CudaSettings,
    backward_combine,
    backward_dispatch,
    cuda_combine,
    cuda_dispatch,
    cuda_resend,
    save_combine,
    save_dispatch,
)
from moeweave.comm.pending import Pending
from moeweave.comm.windows_cuda import WindowMap


@dataclass(frozen=True, kw_only=True)
class CudaOptions:
    """What only the CUDA dispatcher can be told.

    Attributes:
        capacity: rows that a dispatch may bring to a rank. None: as many as come, for which the ranks exchange counts
            and the host waits.
        drop: rows beyond the capacity are dropped and counted (`num_dropped`). Else, the next call or `check` raises.
        align: every expert's rows end at a multiple of this, zeros between.
        num_sms: multiprocessors that may hold the link. None: as `Budget.of` says.
    """

    capacity: int | None = None
    drop: bool = False
    align: int = 1
    num_sms: int | None = None


class OneSidedCudaDispatcher:
    """TokenDispatcher over symmetric CUDA memory.

    Args:
        group: ranks that share the experts, all in one scale-up domain.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        combine: "prereduced" or "exact".
        codec: formats of the rows on the link.
        coded_rows: dispatch hands over codes and scales as they came, for a low-precision grouped product; no gradient.
        max_tokens: tokens that a rank may have at most; windows are sized for them once. None: those of the first
            dispatch, the most of any rank.
        options: see `CudaOptions`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        combine: str = "prereduced",
        *,
        codec: Codec | None = None,
        coded_rows: bool = False,
        max_tokens: int | None = None,
        options: CudaOptions | None = None,
    ) -> None:
        self.codec, self.coded_rows = codec or Codec(), coded_rows
        check_coded_rows(self.codec, coded_rows)
        self.group, self.num_experts, self.exact = group, num_experts, combine == "exact"
        self.max_tokens, self.options = max_tokens, options or CudaOptions()
        self._engine: CudaEngine | None = None

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        engine = self._engine_for(x_TD, ids_TK)
        if self.coded_rows:
            return self._dispatch_coded(engine, x_TD, ids_TK, weights_TK)
        settings = self._settings(engine, self.codec.for_dispatch)
        if handle is not None:
            moves, room = cuda_moves_of(handle), handle.num_rows
            rows_RD, weights_R = cuda_resend(x_TD, weights_TK.detach(), list(moves), room, *settings)
            return Dispatched(rows_RD, None, weights_R, moves.offsets_e, handle)
        capacity = -1 if self.options.capacity is None else self.options.capacity
        rows_RD, weights_R, *rest = cuda_dispatch(
            x_TD, ids_TK, weights_TK.detach(), capacity, self.options.align, *settings
        )
        return self._dispatched(rows_RD, weights_R, CudaMoves(ids_TK, *rest), engine)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        self.check()
        settings = self._settings(self._opened(), self.codec.for_combine)
        moves = list(cuda_moves_of(dispatched.handle))
        return cuda_combine(rows_RD, weights_TK, dispatched.weights_R, moves, *settings)

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        engine = self._engine_for(x_TD, ids_TK)
        settings = self._settings(engine, self.codec.for_dispatch)
        inputs = (x_TD.detach(), ids_TK, weights_TK.detach())
        posted = engine.launcher.runtime.post(inputs, lambda: self.dispatch(*inputs, handle=handle), _tensors_of)

        def finish() -> Dispatched:
            got = posted.wait()
            if self.coded_rows:
                return got
            rows_RD = _Arrived.apply(x_TD, got.rows_RD, cuda_moves_of(got.handle), settings)
            return Dispatched(rows_RD, None, got.weights_R, got.offsets_e, got.handle)

        return Pending(finish)

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        engine = self._opened()
        settings, moves = self._settings(engine, self.codec.for_combine), cuda_moves_of(dispatched.handle)
        inputs = (rows_RD.detach(), weights_TK.detach())
        posted = engine.launcher.runtime.post(inputs, lambda: self.combine(*inputs, dispatched), _tensors_of)
        return Pending(
            lambda: _Returned.apply(rows_RD, weights_TK, dispatched.weights_R, posted.wait(), moves, settings)
        )

    @property
    def num_dropped(self) -> int:
        """Routes that found no room on this rank, over all dispatches that have ended."""
        return self._opened().launcher.num_dropped

    def check(self) -> None:
        """Raise if an exchange has failed or found no room, one that a CUDA graph replayed too. Calls do so as well."""
        self._opened().launcher.check()
        if not self.options.drop and self.num_dropped:
            raise RuntimeError(
                f"capacity ({self.options.capacity}) must hold all rows that come: {self.num_dropped} found no room on "
                "this rank. Raise CudaOptions.capacity, or drop them by CudaOptions(drop=True)."
            )

    def _opened(self) -> CudaEngine:
        if self._engine is None:
            raise RuntimeError(
                "dispatch must come first: it opens the windows. Call dispatch on every rank of the group."
            )
        return self._engine

    def _engine_for(self, x_TD: Tensor, ids_TK: Tensor) -> CudaEngine:
        if self._engine is None:
            row = x_TD.shape[1] * x_TD.dtype.itemsize
            widest = max(
                wire_width(format, self.codec.scale if format != "none" else "token", x_TD.shape[1], x_TD.dtype)
                for format in (self.codec.dispatch, self.codec.combine, self.codec.dispatch_backward,
                               self.codec.combine_backward, "none")
            )  # fmt: skip
            window_map = WindowMap(
                size=self.group.size(), num_experts=self.num_experts, top_k=ids_TK.shape[1],
                max_tokens=self.max_tokens or self._most_tokens(x_TD), row_bytes=max(row, widest),
                back_bytes=max(row, widest), exact=self.exact,
            )  # fmt: skip
            self._engine = cuda_engine_of(self.group, window_map, x_TD.device, self.options.num_sms)
        self.check()
        return self._engine

    def _most_tokens(self, x_TD: Tensor) -> int:
        most = torch.tensor([max(x_TD.shape[0], 1)], device=x_TD.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def _settings(self, engine: CudaEngine, formats: tuple[str, str, str]) -> CudaSettings:
        return CudaSettings(engine.name, self.exact, *formats)

    def _dispatch_coded(self, engine: CudaEngine, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        if torch.is_grad_enabled() and x_TD.requires_grad:
            raise RuntimeError(
                "x.requires_grad (True) must be False with coded_rows=True: codes have no gradient. "
                "Run under torch.no_grad(), or leave coded_rows out."
            )
        format, _, scale = self.codec.for_dispatch
        arrived = engine.dispatch(
            x_TD,
            ids_TK,
            weights_TK,
            format=format,
            scale=scale,
            capacity=self.options.capacity,
            align=self.options.align,
            raw=True,
        )
        assert arrived.scales_RG is not None
        scales = arrived.scales_RG.squeeze(1) if scale == "token" else arrived.scales_RG
        got = self._dispatched(arrived.rows_RD, arrived.weights_R, arrived.moves, engine)
        return Dispatched(got.rows_RD, scales, got.weights_R, got.offsets_e, got.handle)

    def _dispatched(self, rows_RD: Tensor, weights_R: Tensor, moves: CudaMoves, engine: CudaEngine) -> Dispatched:
        layout = Layout.of_windows(moves, rows_RD.shape[0], engine.name)
        return Dispatched(rows_RD, None, weights_R, moves.offsets_e, layout)


def cuda_moves_of(layout: Layout) -> CudaMoves:
    """The one-sided part of a layout."""
    assert isinstance(layout.slots, CudaMoves), "layout of another dispatcher"
    return layout.slots


def _tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = [result.rows_RD, result.scales_R, result.weights_R, *cuda_moves_of(result.handle)]
    return [part for part in parts if part is not None]


class _Arrived(torch.autograd.Function):
    """Joins rows that an asynchronous dispatch brought to the graph of the tokens they came from."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_RD: Tensor, moves: CudaMoves, settings: CudaSettings) -> Tensor:
        save_dispatch(ctx, list(moves), settings)
        # Detached: autograd takes what is handed through as it is for a view, which a model may not add to in place.
        return rows_RD.detach()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return backward_dispatch(ctx, grad_RD), None, None, None


class _Returned(torch.autograd.Function):
    """Joins the result of an asynchronous combine to the graph of the experts' rows."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_TK: Tensor, weights_R: Tensor, y_TD: Tensor, moves: CudaMoves,
        settings: CudaSettings,
    ) -> Tensor:  # fmt: skip
        save_combine(ctx, rows_RD, weights_TK, weights_R, list(moves), settings)
        return y_TD.detach()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_combine(ctx, grad_TD), None, None, None, None
