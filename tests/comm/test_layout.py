"""The integer half of dispatch: the worked example of the module, the order contract, and what a layout holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.layout import Layout
from plain_moe import Case, ids_of, routes_by_row
from run_ranks import run_ranks

NAMES = ["alltoall", "allgather"]
EXAMPLE = ([[3, 0], [0, 2]], [[1, 3]])


def layout_of(name: str, ids: list[list[int]], num_experts: int) -> dict[str, object]:
    ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(-1, 2)
    group = dist.group.WORLD if dist.is_initialized() else None
    layout: Layout = make_dispatcher(name, group, num_experts).layout(ids_TK)  # type: ignore[attr-defined]
    fields = ((field.name, getattr(layout, field.name)) for field in dataclasses.fields(layout))
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in fields}


def example(name: str) -> dict[str, object]:
    return layout_of(name, EXAMPLE[dist.get_rank()], num_experts=4)


@pytest.mark.parametrize("name", NAMES)
def test_worked_example(name: str) -> None:
    first, second = run_ranks(2, example, name)
    assert (first["order_N"], first["send_splits"], first["recv_splits"]) == ([1, 2, 3, 0], [2, 2], [2, 1])
    assert (first["offsets_e"], first["perm_R"]) == ([2, 3], [0, 1, 2])
    assert (second["order_N"], second["send_splits"], second["recv_splits"]) == ([0, 1], [1, 1], [2, 1])
    # Expert 2 has rank 0's row, expert 3 has rank 0's and rank 1's.
    assert (second["offsets_e"], second["perm_R"]) == ([1, 3], [0, 1, 2])
    assert first["top_k"] == 2
    assert (first["num_tokens"], second["num_tokens"]) == (2, 1)
    if name == "allgather":
        assert first["max_tokens"] == second["max_tokens"] == [2]
        assert (first["route_R"], second["route_R"]) == ([1, 2, 4], [3, 0, 5])
    else:
        assert first["route_R"] is None


@pytest.mark.parametrize("name", NAMES)
def test_routes_outside_the_experts_come_last_and_are_not_sent(name: str) -> None:
    found = layout_of(name, [[-1, 3], [4, 0], [-7, 99], [1, 0]], num_experts=4)
    assert found["send_splits"] == found["recv_splits"] == [4]
    assert found["order_N"][:4] == [3, 7, 6, 1]  # type: ignore[index]
    assert sorted(found["order_N"][4:]) == [0, 2, 4, 5]  # type: ignore[index]
    assert found["offsets_e"] == [2, 3, 3, 4]


def both(case: Case) -> tuple[dict[str, object], ...]:
    group = dist.group.WORLD if case.world > 1 else None
    ids_TK = ids_of(case, dist.get_rank())
    shared = ("order_N", "send_splits", "recv_splits", "perm_R", "offsets_e", "num_tokens", "top_k", "group")
    found = []
    for name in NAMES:
        layout = make_dispatcher(name, group, case.num_experts).layout(ids_TK)  # type: ignore[attr-defined]
        values = {key: getattr(layout, key) for key in shared}
        found.append({key: value.tolist() if isinstance(value, Tensor) else value for key, value in values.items()})
        assert all(not tensor.requires_grad for tensor in layout.moves)
        assert all(getattr(layout, host).device.type == "cpu" for host in ("send_splits", "recv_splits"))
    return (*found, layout.route_R.tolist())


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("routing", ["spread", "holes", "hot", "beyond", "none"])
def test_both_exchanges_end_in_one_layout(world: int, routing: str) -> None:
    case = Case((5, 17, 0, 9)[:world], top_k=3, num_experts=12, routing=routing)
    for rank, (swapped, gathered, route_R) in enumerate(run_ranks(world, both, case)):
        assert swapped == gathered
        routes = routes_by_row(case, rank, world)
        longest = max(case.tokens)
        assert route_R == [(source * longest + token) * 3 + k for _, source, token, k in routes]
