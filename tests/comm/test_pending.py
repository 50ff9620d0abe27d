"""`Pending`: one result, waited for once; an error inside the block is what the caller sees."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.pending import Pending
from plain_moe import Case, ids_of, tokens_of, weights_of
from run_ranks import run_ranks


def test_finishes_once_and_gives_the_same_result_ever_after() -> None:
    calls: list[int] = []
    pending = Pending(lambda: calls.append(1) or object())
    assert calls == []
    first = pending.wait()
    assert pending.wait() is first
    assert calls == [1]


def test_leaving_the_block_waits() -> None:
    calls: list[int] = []
    with Pending(lambda: calls.append(1) or "done") as pending:
        assert calls == []
    assert calls == [1]
    assert pending.wait() == "done"
    assert calls == [1]


def test_an_error_inside_the_block_is_not_hidden_behind_the_wait() -> None:
    calls: list[int] = []
    with pytest.raises(KeyError, match="inside"), Pending(lambda: calls.append(1)):
        raise KeyError("inside")
    assert calls == []


def test_an_error_of_the_operation_reaches_every_wait() -> None:
    def fail() -> None:
        raise RuntimeError("the exchange broke")

    pending = Pending(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the exchange broke"):
            pending.wait()


def test_ready_is_here() -> None:
    assert Pending.ready(3).wait() == 3


def overlapping(name: str) -> list[bool]:
    """Two exchanges under way at once, waited for in the other order, other work between."""
    case, rank = Case((5, 9), routing="holes"), dist.get_rank()
    dispatcher = make_dispatcher(name, dist.group.WORLD, case.num_experts, top_k=case.top_k)
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    first, second = (dispatcher.dispatch_async(x_TD * scale, ids_TK, weights_TK) for scale in (1.0, 2.0))
    with second:
        busy = x_TD @ x_TD.t()
    twice, once = second.wait(), first.wait()
    want = dispatcher.dispatch(x_TD, ids_TK, weights_TK).rows_RD
    back = dispatcher.combine_async(twice.rows_RD, weights_TK, twice)
    return [
        torch.equal(once.rows_RD, want),
        torch.equal(twice.rows_RD, want * 2),
        first.wait() is once,
        torch.equal(back.wait(), dispatcher.combine(twice.rows_RD, weights_TK, twice)),
        bool(busy.isfinite().all()),
    ]


@pytest.mark.parametrize("name", ["alltoall", "allgather", "onesided"])
def test_two_exchanges_under_way_at_once(name: str) -> None:
    for equal in run_ranks(2, overlapping, name):
        assert all(equal), equal
