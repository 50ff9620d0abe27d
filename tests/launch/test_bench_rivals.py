"""Adapters of other libraries, over stand-ins with the same signatures.

The stand-in for torchtitan follows torchtitan 0.3.0 (distributed/minimal_async_ep/api.py) in names, order and meaning
of arguments and results; it moves rows over gloo instead of symmetric memory.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.launch.bench import torchtitan
from moeweave.launch.bench.program import bench, main
from moeweave.launch.schema import BenchConfig
from run_ranks import run_ranks

OPS = ["dispatch", "combine", "moe_layer", "moe_layer_backward"]


class StandIn(types.ModuleType):
    """init_buffer, dispatch_op and combine_op; received rows stay in one buffer, as they do there."""

    def __init__(self, fault: str) -> None:
        super().__init__(torchtitan.PACKAGE)
        self.fault = fault
        self.key: tuple[Any, ...] | None = None

    def init_buffer(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        num_max_tokens_per_rank: int,
        num_local_experts: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        key = (group, hidden_dim, num_max_tokens_per_rank, num_local_experts, top_k, dtype, torch.device(device))
        assert self.key in (None, key), "one buffer a process"
        self.key, self.group = key, group
        rows = group.size() * num_max_tokens_per_rank * min(top_k, num_local_experts)
        self.buffer = torch.empty(rows, hidden_dim, dtype=dtype)

    def dispatch_op(
        self,
        dispatch_input: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
        receive_capacity: int,
        ep_size: int,
    ) -> tuple[Tensor, ...]:
        assert receive_capacity == len(self.buffer)
        W, rank, counts_E = ep_size, self.group.rank(), num_local_tokens_per_expert_E
        routes_N = topk_expert_ids_TK.reshape(-1).argsort(stable=True)
        counts_WE = counts_E.new_empty(W, len(counts_E))
        dist.all_gather(list(counts_WE.unbind()), counts_E, group=self.group)
        counts_sde = counts_WE.view(W, W, -1)
        starts_de = counts_sde.sum(0).cumsum(1) - counts_sde.sum(0) + (counts_sde.cumsum(0) - counts_sde)[rank]
        experts_N = topk_expert_ids_TK.reshape(-1)[routes_N]
        within_N = torch.arange(len(routes_N)) - (counts_E.cumsum(0) - counts_E)[experts_N]
        ranks_N, rows_N = experts_N // counts_sde.shape[2], starts_de.reshape(-1)[experts_N] + within_N
        origin_NI = torch.stack([torch.full_like(rows_N, rank), torch.arange(len(routes_N))], 1)
        num_rows = int(counts_sde[:, rank].sum())
        origins = torch.full((receive_capacity, 2), -1)
        origins[:num_rows] = _Moved.apply(origin_NI.double(), ranks_N, rows_N, num_rows, self.group).long()
        tokens_N = routes_N // topk_expert_ids_TK.shape[1]
        moved = _Moved.apply(dispatch_input[tokens_N], ranks_N, rows_N, num_rows, self.group)
        hidden = _InBuffer.apply(moved, self.buffer)
        places_N = torch.empty_like(routes_N).index_copy_(0, routes_N, torch.arange(len(routes_N)))
        counts_e = counts_sde[:, rank].sum(0)
        num_valid = torch.tensor([num_rows])
        return hidden, ranks_N, rows_N, origins[:, 0], origins[:, 1], num_valid, routes_N, places_N, counts_e

    def combine_op(
        self,
        x: Tensor,
        dispatch_dst_ranks: Tensor,
        dispatch_dst_rows: Tensor,
        combine_dst_ranks: Tensor,
        combine_dst_rows: Tensor,
        combine_num_valid_rows: Tensor,
        T_row_to_E_row_N: Tensor,
        E_row_to_T_row_N: Tensor,
        routed_scores_N: Tensor,
        num_tokens: int,
        top_k: int,
    ) -> tuple[Tensor, Tensor]:
        here = slice(int(combine_num_valid_rows))
        ranks, rows = combine_dst_ranks[here], combine_dst_rows[here]
        sent = _Overwritten.apply(x, self.buffer)[here]
        routed_ND = _Moved.apply(sent, ranks, rows, len(E_row_to_T_row_N), self.group)
        by_token = routed_ND[T_row_to_E_row_N].float() * routed_scores_N.unsqueeze(1)
        out_TD = by_token.view(num_tokens, top_k, -1).sum(1).to(x.dtype)
        if self.fault == "combine" and out_TD.numel():
            out_TD.detach().view(-1)[out_TD.numel() // 2] += 8
        return out_TD, routed_ND


class _InBuffer(torch.autograd.Function):
    """The rows that arrived, in the library's buffer."""

    @staticmethod
    def forward(ctx: Any, moved: Tensor, buffer: Tensor) -> Tensor:
        ctx.num_rows = len(moved)
        buffer[: len(moved)] = moved
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[: ctx.num_rows], None


class _Overwritten(torch.autograd.Function):
    """The gradient of what combine sent arrives in the same buffer: rows that were not copied are lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.buffer.data.fill_(float("nan"))
        return grad, None


class _Moved(torch.autograd.Function):
    """Row n to row rows_N[n] of rank ranks_N[n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks_N: Tensor, rows_N: Tensor, num_rows: int, group: Any) -> Tensor:
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, (x.detach(), ranks_N, rows_N), group=group)
        out = x.new_empty(num_rows, *x.shape[1:])
        sources = []
        for source, (rows, ranks, places) in enumerate(gathered):
            mine = (ranks == group.rank()).nonzero().squeeze(1)
            out[places[mine]] = rows[mine]
            sources.append((torch.full_like(mine, source), mine, places[mine]))
        ctx.group, ctx.num = group, len(x)
        ctx.back = [torch.cat(each) for each in zip(*sources, strict=True)]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        source, row, place = ctx.back
        return _Moved.apply(grad[place], source, row, ctx.num, ctx.group), None, None, None, None


def lines(world: int, fault: str, dtype: str) -> list[dict[str, Any]]:
    sys.modules[torchtitan.PACKAGE] = StandIn(fault)
    try:
        return bench(
            BenchConfig(
                op=OPS,
                backend=["alltoall", "torchtitan"],
                device="cpu",
                iterations=2,
                warmup=1,
                tokens=37,
                hidden=24,
                experts=8,
                topk=3,
                expert_hidden=16,
                dtype=dtype,
            ),
            world,
        )
    finally:
        del sys.modules[torchtitan.PACKAGE]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 4])
def test_torchtitan_is_called_as_it_wants_to_be(world: int, dtype: str) -> None:
    found = run_ranks(world, lines, world, "", dtype)[0]
    mine = [line for line in found if line["backend"] == "torchtitan"]
    assert [line["op"] for line in mine] == OPS
    for line in mine:
        assert line["wrong"] == 0, line["op"]
        assert line["median"] > 0
        assert line["logical_bytes"] < line["wire_bytes"]
        assert line["ratio"] > 0


def test_torchtitan_is_checked_like_the_others() -> None:
    found = run_ranks(2, lines, 2, "combine", "float32")[0]
    wrong = {(line["backend"], line["op"]): line["wrong"] > 0 for line in found if line["op"] in OPS}
    assert {op for (backend, op), is_wrong in wrong.items() if is_wrong} == {
        "combine",
        "moe_layer",
        "moe_layer_backward",
    }
    assert not any(is_wrong for (backend, _), is_wrong in wrong.items() if backend == "alltoall")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, torchtitan.PACKAGE, None)  # import raises ImportError
    with pytest.raises(ValueError, match=r"backend=torchtitan: .*Install torchtitan 0.3.0 or newer"):
        torchtitan.check(BenchConfig(op="dispatch", backend="torchtitan"))
    assert main(["device=cpu", "op=dispatch", "backend=torchtitan"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
