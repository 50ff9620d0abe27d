"""Collectives in the shapes that dispatch needs, over a group and alone."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moeweave.comm.communicator import Communicator
from run_ranks import run_ranks


def collectives() -> dict[str, object]:
    comm = Communicator(dist.group.WORLD)
    rank = comm.rank
    sends = [[1, 2], [0, 3]][rank]
    rows = torch.arange(3.0).add(10 * rank)[:, None]
    received, work = comm.all_to_all(rows, sends, [[1, 0], [2, 3]][rank])
    posted, later = comm.all_to_all(rows, sends, [[1, 0], [2, 3]][rank], async_op=True)
    assert later is not None
    later.wait()
    counts = torch.tensor([[0, 1], [2, 3]]) + 10 * rank
    return {
        "all_to_all": received.flatten().tolist(),
        "posted": posted.flatten().tolist(),
        "work": work,
        "swap": comm.swap(counts).tolist(),
        "all_gather": comm.all_gather(torch.tensor([rank, 7])).tolist(),
        "all_gather_nothing": list(comm.all_gather(torch.empty(0, 3)).shape),
        "reduce_scatter": comm.reduce_scatter(torch.tensor([[1.0], [2.0]]) + rank).tolist(),
        "all_reduce": comm.all_reduce(torch.tensor(rank + 1)).item(),
        "again": Communicator.named(comm.name).group is dist.group.WORLD,
    }


def test_over_two_ranks() -> None:
    first, second = run_ranks(2, collectives)
    assert (first["all_to_all"], second["all_to_all"]) == ([0.0], [1.0, 2.0, 10.0, 11.0, 12.0])
    assert (first["posted"], second["posted"]) == (first["all_to_all"], second["all_to_all"])
    assert first["work"] is None
    assert (first["swap"], second["swap"]) == ([[0, 1], [10, 11]], [[2, 3], [12, 13]])
    assert first["all_gather"] == second["all_gather"] == [[0, 7], [1, 7]]
    assert first["all_gather_nothing"] == [2, 0, 3]
    assert (first["reduce_scatter"], second["reduce_scatter"]) == ([3.0], [5.0])
    assert first["all_reduce"] == second["all_reduce"] == 3
    assert first["again"]
    assert second["again"]


def test_alone_every_collective_is_the_identity() -> None:
    comm, rows = Communicator(None), torch.arange(6.0).view(3, 2)
    assert (comm.rank, comm.size, comm.name) == (0, 1, "")
    assert comm.all_to_all(rows, [3], [3]) == (rows, None)
    assert comm.swap(rows) is rows
    assert torch.equal(comm.all_gather(rows), rows[None])
    assert torch.equal(comm.reduce_scatter(rows[None]), rows)
    total = comm.all_reduce(rows)
    assert torch.equal(total, rows)
    assert total is not rows
    assert Communicator.named("").size == 1
