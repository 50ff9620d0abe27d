"""Ascend's dispatch and combine operators over a gloo group, written from torch-npu's documentation of
npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2: rules on inputs, shapes, order, quantisation.

What the documentation leaves open is hostile here: rows past the last are NaN (int8: 99), tokens that take no part get
NaN, the content of assist_info is this file's own.

Legend: B tokens of the call, K routes a token, D width, A rows at most, E experts, e experts of this rank, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeweave.comm.communicator import Communicator

ASSIST = 128  # int32 of assist_info a row


class NpuEmulator:
    """A `Call` that runs the two operators on CPU ranks; `names` lists what was run.

    Raises:
        ValueError: an input that the documentation forbids.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, **arguments: Any) -> Any:
        self.names.append(name)
        return {
            "npu_moe_distribute_dispatch_v2": dispatch_v2,
            "npu_moe_distribute_combine_v2": combine_v2,
        }[name](**arguments)


def dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
) -> tuple[Tensor, ...]:
    """x [B, D], expert_ids int32 [B, K] -> expand_x [A, D], dynamic_scales [A], assist_info_for_combine [A * 128],
    expert_token_nums int64 [e], ep_recv_counts int32 [e * W], tp_recv_counts [0], expand_scales [A]."""
    comm = Communicator.named(group_ep)
    _check(comm, x, expert_ids, x_active_mask, ep_world_size, ep_rank_id, moe_expert_num, global_bs)
    (num_tokens, top_k), num_local = expert_ids.shape, moe_expert_num // ep_world_size
    most = (global_bs or num_tokens * ep_world_size) // ep_world_size
    capacity = most * ep_world_size * min(num_local, top_k)
    sent, scales_B = (x, torch.ones(num_tokens)) if quant_mode == 0 else _quantized(x)
    active = torch.ones_like(expert_ids, dtype=torch.bool) if x_active_mask is None else x_active_mask
    active = active if active.dim() == 2 else active[:, None].expand_as(expert_ids)
    weights = torch.zeros(expert_ids.shape) if expert_scales is None else expert_scales
    x_WBD, scales_WB, weights_WBK, ids_WBK = (
        comm.all_gather(_grown(part, most, fill))
        for part, fill in ((sent, 0), (scales_B, 0), (weights, 0), (expert_ids.masked_fill(~active, -1), -1))
    )

    places = []
    recv_counts = []
    for expert in range(ep_rank_id * num_local, (ep_rank_id + 1) * num_local):
        for source in range(ep_world_size):
            hits = (ids_WBK[source] == expert).nonzero()
            places += [(source, token, k) for token, k in hits.tolist()]
            recv_counts.append(len(places))
    assert len(places) <= capacity
    expand_x = torch.full((capacity, x.shape[1]), 99 if quant_mode else float("nan")).to(sent.dtype)
    scales, expand_scales = torch.full((capacity,), float("nan")), torch.full((capacity,), float("nan"))
    assist = torch.full((capacity, ASSIST), -1, dtype=torch.int32)
    for row, (source, token, k) in enumerate(places):
        expand_x[row], scales[row] = x_WBD[source, token], scales_WB[source, token]
        expand_scales[row] = weights_WBK[source, token, k]
        assist[row, :3] = torch.tensor([source, token, k])
    ends = torch.tensor(recv_counts, dtype=torch.int32)
    ends_e = ends[ep_world_size - 1 :: ep_world_size].to(torch.int64)
    nums_e = ends_e if expert_token_nums_type == 0 else ends_e.diff(prepend=torch.zeros(1, dtype=torch.int64))
    return expand_x, scales, assist.flatten(), nums_e, ends, torch.empty(0, dtype=torch.int32), expand_scales


def combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    global_bs: int = 0,
    comm_alg: str = "",
) -> Tensor:
    """expand_x [A, D] -> [B, D] = sum over a token's routes of expert_scales * row, plus shared_expert_x."""
    comm = Communicator.named(group_ep)
    _check(comm, expand_x, expert_ids, x_active_mask, ep_world_size, ep_rank_id, moe_expert_num, global_bs, True)
    (num_tokens, top_k), num_local = expert_ids.shape, moe_expert_num // ep_world_size
    most = (global_bs or num_tokens * ep_world_size) // ep_world_size
    capacity = most * ep_world_size * min(num_local, top_k)
    _demand(expand_x.shape[0] == capacity, f"expand_x has {expand_x.shape[0]} rows, not A = {capacity}")
    _demand(assist_info_for_combine.shape == (capacity * ASSIST,), "assist_info_for_combine is not [A * 128]")
    _demand(ep_send_counts.shape == (ep_world_size * num_local,), "ep_send_counts is not [e * W]")
    _demand(expert_scales.dtype == torch.float32 and expert_scales.shape == expert_ids.shape, "expert_scales")
    rows_WAD, assist_WA, ends_W = (
        comm.all_gather(part)
        for part in (expand_x, assist_info_for_combine.view(capacity, ASSIST)[:, :3].contiguous(), ep_send_counts)
    )
    routes = torch.zeros(num_tokens, top_k, expand_x.shape[1])
    for rows, assist, ends in zip(rows_WAD, assist_WA, ends_W, strict=True):
        arrived = assist[: int(ends[-1])]
        mine = arrived[:, 0] == ep_rank_id
        routes[arrived[mine, 1].long(), arrived[mine, 2].long()] = rows[: len(arrived)][mine].float()
    active = torch.ones_like(expert_ids, dtype=torch.bool) if x_active_mask is None else x_active_mask
    active = active if active.dim() == 2 else active[:, None].expand_as(expert_ids)
    total = (routes * (expert_scales * active)[:, :, None]).sum(1)
    if shared_expert_x is not None:
        total += shared_expert_x.float()
    return torch.where(active.any(1, keepdim=True), total, float("nan")).to(expand_x.dtype)


def _check(
    comm: Communicator,
    x: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    size: int,
    rank: int,
    num_experts: int,
    global_bs: int,
    combine: bool = False,
) -> None:
    _demand(x.dim() == 2 and x.dtype in (torch.bfloat16, torch.float16), f"tokens are {x.dtype}")
    _demand(ids.dim() == 2 and ids.dtype == torch.int32, f"expert_ids are {ids.dtype}")
    _demand(ids.shape[0] > 0 and (combine or x.shape[0] == ids.shape[0]), "BS must be at least 1")
    _demand(bool(((ids >= 0) & (ids < num_experts)).all()), "expert_ids must be in [0, moe_expert_num)")
    _demand(all(len(set(row)) == len(row) for row in ids.tolist()), "a row repeats an expert")
    _demand((size, rank) == (comm.size, comm.rank) and num_experts % size == 0, "ep_world_size, ep_rank_id")
    sizes = comm.all_gather(torch.tensor([ids.shape[0], global_bs])).tolist()
    _demand(all(each[1] == global_bs for each in sizes), "global_bs differs")
    tokens = [each[0] for each in sizes]
    if len(set(tokens)) > 1:
        _demand(global_bs >= max(tokens) * size and mask is None, "BS differs: global_bs = max * W and no mask")
    _demand(global_bs == 0 or global_bs >= max(tokens) * size, "global_bs is too small")
    if mask is not None:
        _demand(mask.dtype == torch.bool and mask.shape in (ids.shape, ids.shape[:1]), "x_active_mask")
        _demand(mask.dim() == 2 or not bool((mask[1:] & ~mask[:-1]).any()), "true must come before false")


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"the operator refuses: {rule}")


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """quant_mode 2: int8(x * 127 / amax) and amax / 127 of each token, rounded half to even; a zero row is zero."""
    wide = x.float()
    amax = wide.abs().amax(1)
    factor = torch.where(amax > 0, 127.0 / amax, 0.0)
    return (wide * factor[:, None]).round().clamp(-127, 127).to(torch.int8), amax / 127.0


def _grown(part: Tensor, size: int, fill: int) -> Tensor:
    grown = part.new_full((size, *part.shape[1:]), fill)
    grown[: part.shape[0]] = part
    return grown
