"""Where every row goes: the integer half of dispatch, kept apart from the rows so that it can be cached and replayed.

Routes are numbered t * K + k. Two collectives can tell a rank what it will receive: an exchange of counts per expert
(`exchange_layout`, for the all-to-all dispatcher) or a gather of all expert ids (`gather_layout`, for the all-gather
one). Both end in the same `Layout`, so both put the rows in the same order: by expert, then by source rank, then by
route number. Slots come from sorts and prefix sums, never from atomics, so two runs are bit-identical.

Worked example, 2 ranks, 4 experts, top-2. Rank 0 has ids [[3, 0], [0, 2]], rank 1 has [[1, 3]].
Rank 0 sends in the order of experts: routes 1, 2 (expert 0) stay, routes 3 (expert 2), 0 (expert 3) go to rank 1:
order [1, 2, 3, 0], send_splits [2, 2]. It receives rank 1's route to expert 1: recv_splits [2, 1], offsets_e [2, 3].

Legend: T tokens here, K routes a token, N = T * K routes, R rows here, E experts, e experts of this rank, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeweave.comm.communicator import Communicator
from moeweave.comm.onesided import Moves
from moeweave.comm.onesided_cuda import CudaMoves

if TYPE_CHECKING:  # which sorts routes by what is here
    from moeweave.comm.onesided_nodes import NodeMoves
    from moeweave.comm.onesided_parts import PartMoves


@dataclass(frozen=True)
class Layout:
    """Integers only: nothing here has a graph, so a layout can outlive its step (cached dispatch, recompute).

    Attributes:
        order_N: int64, this rank's routes sorted by expert; the first `send_splits.sum()` are routed, the rest are not.
            Of an exchange by nodes this and the next three are those inside the node.
        send_splits, recv_splits: int64 [W] on the host, rows sent to and received from each rank.
        perm_R: int64, `rows_RD[r]` is row `perm_R[r]` in arrival order.
        offsets_e: int32 on the device, exclusive ends of the experts' rows in `rows_RD`.
        num_tokens, top_k: T and K.
        group: name of the process group, "" for this rank alone.
        route_R: gathered exchange only: int64, the route of each row, numbered (w * T_max + t) * K + k.
        max_tokens: gathered exchange only: int64 [1] on the host, T_max, the largest T of the group.
        slots: one-sided exchange only: where rows went in the windows.
        num_rows: one-sided exchange on CUDA only: R, rows that there is room for.
    """

    order_N: Tensor
    send_splits: Tensor
    recv_splits: Tensor
    perm_R: Tensor
    offsets_e: Tensor
    num_tokens: int
    top_k: int
    group: str
    route_R: Tensor | None = None
    max_tokens: Tensor | None = None
    slots: Moves | NodeMoves | PartMoves | CudaMoves | None = None
    num_rows: int = 0

    @classmethod
    def of_windows(cls, moves: CudaMoves, num_rows: int, engine: str) -> Layout:
        """Of an exchange that the host knows no counts of: everything is in `slots`, on the device."""
        none = torch.empty(0, dtype=torch.int64)
        (num_tokens, top_k), ends = moves.ids_TK.shape, moves.offsets_e
        return cls(none, none, none, none, ends, num_tokens, top_k, engine, slots=moves, num_rows=num_rows)

    @property
    def moves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """order_N, send_splits, recv_splits, perm_R: what the operators that move rows take."""
        return self.order_N, self.send_splits, self.recv_splits, self.perm_R


def sort_routes(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Ids [T, K] -> routes sorted by expert, not-routed ones last [N]; routes per expert [E]."""
    key_N = ids_TK.reshape(-1)
    key_N = torch.where((key_N < 0) | (key_N >= num_experts), num_experts, key_N)
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=key_N.device)
    counts_E.scatter_add_(0, key_N, torch.ones_like(key_N))
    return torch.argsort(key_N, stable=True), counts_E[:num_experts]


def arrival_to_expert_major(recv_counts_We: Tensor, num_rows: int) -> Tensor:
    """Rows arrive by source, then expert -> for each row by expert, then source, its place in arrival order [R]."""
    lengths = recv_counts_We.t().reshape(-1)
    starts_We = (recv_counts_We.reshape(-1).cumsum(0) - recv_counts_We.reshape(-1)).view_as(recv_counts_We)
    shift = starts_We.t().reshape(-1) - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths, output_size=num_rows) + torch.arange(num_rows, device=shift.device)


def _finish(counts_E: Tensor, recv_counts_We: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts sent per expert and received per (source, expert) -> send_splits, recv_splits, perm_R, offsets_e."""
    sends_W = counts_E.view(recv_counts_We.shape).sum(1)
    # The one host synchronisation of a dynamic exchange: split sizes must be known to post it.
    splits = torch.stack([sends_W, recv_counts_We.sum(1)]).cpu()
    perm_R = arrival_to_expert_major(recv_counts_We, int(splits[1].sum()))
    offsets_e = recv_counts_We.sum(0).cumsum(0).to(torch.int32)
    return splits[0].clone(), splits[1].clone(), perm_R, offsets_e


@torch.library.custom_op("moeweave::exchange_layout", mutates_args=())
def exchange_layout(ids_TK: Tensor, num_experts: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Layout by an exchange of counts.

    Args:
        ids_TK: int64 expert ids; negative or >= num_experts means not routed.
        num_experts: experts over the whole group, a multiple of its size.
        group: name of the process group, "" for this rank alone.

    Returns:
        order_N, send_splits, recv_splits, perm_R, offsets_e (see `Layout`).
    """
    comm = Communicator.named(group)
    order_N, counts_E = sort_routes(ids_TK, num_experts)
    recv_counts_We = comm.swap(counts_E.view(comm.size, -1))
    return order_N, *_finish(counts_E, recv_counts_We)


@exchange_layout.register_fake
def _(ids_TK: Tensor, num_experts: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = Communicator.named(group).size
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        ids_TK.new_empty(ids_TK.numel(), dtype=torch.int64),
        torch.empty(size, dtype=torch.int64, device="cpu"),
        torch.empty(size, dtype=torch.int64, device="cpu"),
        ids_TK.new_empty(num_rows, dtype=torch.int64),
        ids_TK.new_empty(num_experts // size, dtype=torch.int32),
    )


@torch.library.custom_op("moeweave::gather_layout", mutates_args=())
def gather_layout(
    ids_TK: Tensor, num_experts: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Layout by a gather of all expert ids; ranks with fewer tokens than the largest are padded with -1.

    Returns:
        order_N, send_splits, recv_splits, perm_R, offsets_e, route_R, max_tokens (see `Layout`).
    """
    comm = Communicator.named(group)
    num_tokens, top_k = ids_TK.shape
    tokens_W = comm.all_gather(torch.tensor([num_tokens], device=ids_TK.device)).view(-1)
    max_tokens = int(tokens_W.max())
    padded = ids_TK.new_full((max_tokens, top_k), -1)
    padded[:num_tokens] = ids_TK
    ids_WN = comm.all_gather(padded).view(comm.size, -1)

    arranged = arrange_gathered(ids_TK, ids_WN, num_experts, comm.rank)
    return *arranged, torch.tensor([max_tokens])


def arrange_gathered(
    ids_TK: Tensor, ids_WN: Tensor, num_experts: int, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All ranks' ids, padded to the same N, -> order_N, send_splits, recv_splits, perm_R, offsets_e, route_R."""
    size = ids_WN.shape[0]
    num_local = num_experts // size
    order_N, counts_E = sort_routes(ids_TK, num_experts)
    local_WN = ids_WN - rank * num_local
    here_WN = (local_WN >= 0) & (local_WN < num_local)
    local_WN = torch.where(here_WN, local_WN, num_local)
    counts = torch.zeros(size, num_local + 1, dtype=torch.int64, device=ids_TK.device)
    counts.scatter_add_(1, local_WN, torch.ones_like(local_WN))
    send, recv, perm_R, offsets_e = _finish(counts_E, counts[:, :num_local].contiguous())
    # Stable, so rows of one expert stay sorted by (source, route): the order that arrival by all-to-all gives.
    route_R = torch.argsort(local_WN.reshape(-1), stable=True)[: perm_R.numel()].clone()
    return order_N, send, recv, perm_R, offsets_e, route_R


def arrange_fixed(ids_WN: Tensor, num_experts: int, rank: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The same without reading the device: offsets_e and route_R, as long as it can get, W * M * min(K, e).

    Routes past `offsets_e[-1]` are routes to other ranks.
    """
    num_local = num_experts // ids_WN.shape[0]
    local_N = ids_WN.reshape(-1) - rank * num_local
    local_N = torch.where((local_N >= 0) & (local_N < num_local), local_N, num_local)
    counts_e = torch.zeros(num_local + 1, dtype=torch.int64, device=ids_WN.device)
    counts_e.scatter_add_(0, local_N, torch.ones_like(local_N))
    num_rows = ids_WN.numel() // top_k * min(top_k, num_local)
    return counts_e[:num_local].cumsum(0).to(torch.int32), torch.argsort(local_N, stable=True)[:num_rows]


@gather_layout.register_fake
def _(ids_TK: Tensor, num_experts: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = Communicator.named(group).size
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        ids_TK.new_empty(ids_TK.numel(), dtype=torch.int64),
        torch.empty(size, dtype=torch.int64, device="cpu"),
        torch.empty(size, dtype=torch.int64, device="cpu"),
        ids_TK.new_empty(num_rows, dtype=torch.int64),
        ids_TK.new_empty(num_experts // size, dtype=torch.int32),
        ids_TK.new_empty(num_rows, dtype=torch.int64),
        torch.empty(1, dtype=torch.int64, device="cpu"),
    )
