"""The one-sided exchange on NVIDIA GPUs: one launch a dispatch, one a combine, no host synchronisation.

    dispatch       tokens to the ranks of their experts, a row once to each rank, expanded there to expert-major rows
    resend         other tokens along the same routes (a cached layout)
    combine        results back, summed on the experts' ranks first ("prereduced"), or a row a route ("exact")
    gradients      backward of combine: weight times gradient to every row, and the weights' own gradients
The backward of dispatch is a combine without weights.

Wins where ranks share a scale-up domain: rows go straight to their place on the peer, and are expanded or summed there
as they arrive. An engine has one round of each kind under way: micro-batches that overlap need one engine each. Every
rank issues the same operations in the same order. Results are never window memory.

Legend: T tokens here, K routes a token, D width, R rows that there is room for, W ranks, M tokens of a rank at most,
e experts of this rank, G scales of a row, C chunks of a rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeweave.comm.codec import num_scales, wire_width
from moeweave.comm.onesided_launch import Budget, Launcher, ceil_div, set_tensors
from moeweave.comm.onesided_runtime import Runtime
from moeweave.comm.windows_cuda import CudaWindow, WindowMap
from moeweave.kernels_ext import onesided
from moeweave.kernels_ext.onesided import CACHED, EXACT, GRADIENT, RAW, WEIGHTED
from moeweave.kernels_ext.quantize_rows import CODES


class CudaMoves(NamedTuple):
    """Where every row of a dispatch went: integers only, for the way back and for other tokens of the same routes.

    Attributes:
        ids_TK: expert ids, as given.
        sent_TK: int32, rank << 24 | slot of the ranks that a token went to, by rank, then -1.
        route_row: int32 [W, M, K], for each slot that arrived the rows of its routes; -1 not here, -2 dropped.
        chunks: int32 [W, C], start << 8 | count of the slots that each chunk of a source filled.
        token: int32 [W, M], the source's token in each slot.
        offsets_e: int32, ends of the experts' rows.
    """

    ids_TK: Tensor
    sent_TK: Tensor
    route_row: Tensor
    chunks: Tensor
    token: Tensor
    offsets_e: Tensor


class CudaArrived(NamedTuple):
    """What a dispatch brought. scales_RG is None unless rows stay encoded; rows_RD are then codes."""

    rows_RD: Tensor
    scales_RG: Tensor | None
    weights_R: Tensor
    moves: CudaMoves


class CudaEngine:
    """Dispatch and combine over one window.

    Args:
        window, window_map, timeout, budget, runtime: see `Launcher`.

    Attributes:
        map: the window's.
        name: what operators call it, once it is registered.
    """

    def __init__(
        self, window: CudaWindow, window_map: WindowMap, *, timeout: float = 600.0, budget: Budget | None = None,
        runtime: Runtime | None = None,
    ) -> None:  # fmt: skip
        self.launcher = Launcher(window, window_map, timeout, budget, runtime)
        self.map, self.device, self.name = window_map, self.launcher.device, ""

    def dispatch(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *,
        format: str = "none",
        scale: str = "token",
        capacity: int | None = None,
        align: int = 1,
        raw: bool = False,
    ) -> CudaArrived:
        """Tokens [T, D] to expert-major rows [R, D] of this rank's experts.

        Args:
            ids_TK: int32 or int64; negative or too large means not routed.
            format, scale: of the wire rows, see comm/codec.py.
            capacity: R. None asks the other ranks for the exact number first, which synchronises the host. Rows beyond
                a given capacity are dropped and counted (`num_dropped`).
            align: every expert's rows end at a multiple of this, zeros between.
            raw: rows stay encoded: codes and scales for a low-precision grouped GEMM.
        """
        self._check_input(x_TD, ids_TK, format, scale)
        ids_TK = ids_TK.contiguous()
        capacity = self.plan(ids_TK, align) if capacity is None else capacity
        (T, top_k), M, new = ids_TK.shape, self.map.max_tokens, self._integers
        moves = CudaMoves(
            ids_TK, new(T, top_k), new(self.map.size, M, top_k), new(self.map.size, self.map.num_chunks),
            new(self.map.size, M), new(self.map.num_local),
        )  # fmt: skip
        arrived = self._outputs(x_TD, moves, capacity, format, scale, raw)
        self._launch_dispatch(x_TD, weights_TK, arrived, format, scale, RAW if raw else 0, align)
        return arrived

    def resend(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        moves: CudaMoves,
        capacity: int,
        *,
        format: str = "none",
        scale: str = "token",
    ) -> CudaArrived:
        """`dispatch` of other tokens with the ids, capacity and alignment of an earlier one."""
        self._check_input(x_TD, moves.ids_TK, format, scale)
        arrived = self._outputs(x_TD, moves, capacity, format, scale, raw=False)
        arrived.rows_RD.zero_(), arrived.weights_R.zero_()  # rows between an expert's end and its aligned end
        self._launch_dispatch(x_TD, weights_TK, arrived, format, scale, CACHED, 1)
        return arrived

    def gradients(
        self,
        grad_TD: Tensor,
        rows_RD: Tensor,
        weights_R: Tensor,
        moves: CudaMoves,
        *,
        format: str = "none",
        scale: str = "token",
    ) -> tuple[Tensor, Tensor]:
        """Of a weighted combine's result [T, D] -> of its rows [R, D], and of its weights fp32 [T, K]."""
        self._check_input(grad_TD, moves.ids_TK, format, scale)
        grad_RD, grad_TK = torch.zeros_like(rows_RD), grad_TD.new_empty(moves.ids_TK.shape, dtype=torch.float32)
        params = self._params("dispatch", grad_TD.shape[1], moves, format, scale, grad_TD.dtype)
        grad_TD, rows_RD = grad_TD.contiguous(), rows_RD.contiguous()
        set_tensors(params, x=grad_TD, rows=grad_RD, saved=rows_RD, row_weights=weights_R, grad_weights=grad_TK)
        params.capacity, params.flags, params.receiver_parts = rows_RD.shape[0], CACHED | GRADIENT, 1
        self.launcher.launch("moeweave_dispatch", params, grad_TD.dtype, format, scale)
        self.launcher.launch(
            "moeweave_weight_gradients", params, grad_TD.dtype, format, scale, grid=self.launcher.budget.receivers
        )
        return grad_RD, grad_TK

    def combine(
        self,
        rows_RD: Tensor,
        weights: Tensor | None,
        moves: CudaMoves,
        *,
        exact: bool = False,
        format: str = "none",
        scale: str = "token",
    ) -> Tensor:
        """Rows [R, D] -> y [T, D], the weighted sum over each token's routes.

        weights: fp32 [R] of the rows ("prereduced"), [T, K] of the tokens (`exact`); None sums without weights.
        """
        if exact and not self.map.exact:
            raise ValueError("exact (True) needs a window with exact=True. Make the engine with combine='exact'.")
        _check_row(rows_RD, format, scale, self.map.back_bytes)
        rows_RD, num_tokens = rows_RD.contiguous(), moves.ids_TK.shape[0]
        y_TD = rows_RD.new_empty(num_tokens, rows_RD.shape[1])
        params = self._params("combine", rows_RD.shape[1], moves, format, scale, rows_RD.dtype)
        weights = None if weights is None else weights.contiguous()
        set_tensors(
            params,
            x=y_TD,
            rows=rows_RD,
            **({"weights" if exact else "row_weights": weights} if weights is not None else {}),
        )
        params.capacity = rows_RD.shape[0]
        params.weights_type = onesided.WEIGHTS[weights.dtype] if exact and weights is not None else 0
        params.flags = (EXACT if exact else 0) | (0 if weights is None else WEIGHTED)
        of_block = ceil_div(num_tokens * min(self.map.size, self.map.top_k), self.launcher.budget.senders)
        self.launcher.share_rows("moeweave_combine", params, of_block, num_tokens)
        if format != "none" and scale == "token":
            self.launcher.keep_sums("moeweave_combine", params, rows_RD.shape[1] * rows_RD.dtype.itemsize // 16)
        self.launcher.launch("moeweave_combine", params, rows_RD.dtype, format, scale)
        return y_TD

    def plan(self, ids_TK: Tensor, align: int = 1) -> int:
        """Number of rows that a dispatch of these ids will bring. Synchronises the host."""
        offsets_e = self._integers(self.map.num_local)
        params = self.launcher.params("plan")
        set_tensors(params, ids=ids_TK, offsets=offsets_e)
        params.ids_wide, params.num_tokens = int(ids_TK.dtype == torch.int64), ids_TK.shape[0]
        params.capacity, params.align, params.senders = 2**31 - 1, align, 1
        self.launcher.launch("moeweave_plan", params, torch.bfloat16, "none", "token", grid=1)
        self.launcher.runtime.synchronize()
        self.launcher.check()
        return self.launcher.num_planned

    def worst_capacity(self) -> int:
        """Rows that can arrive at most: every token of every rank on as many experts of this one as it may choose."""
        return self.map.size * self.map.max_tokens * min(self.map.top_k, self.map.num_local)

    def _launch_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, arrived: CudaArrived, format: str, scale: str, flags: int, align: int
    ) -> None:
        x_TD, weights_TK = x_TD.contiguous(), weights_TK.detach().contiguous()
        params = self._params("dispatch", x_TD.shape[1], arrived.moves, format, scale, x_TD.dtype)
        set_tensors(params, x=x_TD, weights=weights_TK, rows=arrived.rows_RD, row_weights=arrived.weights_R)
        if arrived.scales_RG is not None:
            set_tensors(params, scales=arrived.scales_RG)
        params.weights_type = onesided.WEIGHTS[weights_TK.dtype]
        params.capacity, params.flags, params.align = arrived.rows_RD.shape[0], flags, align
        num_tokens, chunk = x_TD.shape[0], self.map.chunk
        of_block = ceil_div(ceil_div(num_tokens, chunk), self.launcher.budget.senders) * chunk
        rows = num_tokens * min(self.map.size, self.map.top_k)
        self.launcher.share_rows("moeweave_dispatch", params, min(of_block, num_tokens), rows)
        self.launcher.launch("moeweave_dispatch", params, x_TD.dtype, format, scale)

    def _outputs(
        self, x_TD: Tensor, moves: CudaMoves, capacity: int, format: str, scale: str, raw: bool
    ) -> CudaArrived:
        width, weights_R = x_TD.shape[1], x_TD.new_empty(capacity, dtype=torch.float32)
        if not raw:
            return CudaArrived(x_TD.new_empty(capacity, width), None, weights_R, moves)
        if format == "none" or width % 16:
            raise ValueError(f"raw rows need a codec and a width ({width}) that is a multiple of 16. Set raw=False.")
        scales_RG = x_TD.new_empty(capacity, num_scales(scale, width), dtype=torch.float32)
        return CudaArrived(x_TD.new_empty(capacity, width, dtype=CODES[format]), scales_RG, weights_R, moves)

    def _params(self, kind: str, width: int, moves: CudaMoves, format: str, scale: str, dtype: torch.dtype) -> Any:
        """Everything that an operation over `moves` is told, but its rows."""
        params = self.launcher.params(kind)
        set_tensors(
            params, ids=moves.ids_TK, sent=moves.sent_TK, offsets=moves.offsets_e, route_row=moves.route_row,
            chunks=moves.chunks, tokens=moves.token,
        )  # fmt: skip
        params.ids_wide, params.num_tokens = int(moves.ids_TK.dtype == torch.int64), moves.ids_TK.shape[0]
        params.dim, params.row_stride = width, wire_width(format, scale, width, dtype)
        return params

    def _check_input(self, x_TD: Tensor, ids_TK: Tensor, format: str, scale: str) -> None:
        _check_row(x_TD, format, scale, self.map.row_bytes)
        if x_TD.shape[0] != ids_TK.shape[0] or x_TD.shape[0] > self.map.max_tokens:
            raise ValueError(
                f"tokens ({x_TD.shape[0]}, ids of {ids_TK.shape[0]}) must be at most max_tokens "
                f"({self.map.max_tokens}). Raise max_tokens, or split the batch."
            )
        if ids_TK.shape[1] != self.map.top_k or ids_TK.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids {tuple(ids_TK.shape)} {ids_TK.dtype} must be int32 or int64 [T, {self.map.top_k}].")

    def _integers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.device)


def _check_row(rows: Tensor, format: str, scale: str, room: int) -> None:
    """Raise ValueError unless the kernels take such rows, and `room` bytes of the window hold one."""
    width, dtype = rows.shape[1], rows.dtype
    if dtype not in onesided.DTYPES:
        raise ValueError(f"rows ({dtype}) must be bfloat16, float16 or float32. Use dispatcher='alltoall'.")
    if width * dtype.itemsize % 16:
        raise ValueError(f"width ({width}, {dtype}) must fill a multiple of 16 bytes. Use dispatcher='alltoall'.")
    if wire_width(format, scale, width, dtype) > room:
        raise ValueError(f"width ({width}, {dtype}) must fit the window's rows of {room} bytes. Make a wider window.")
