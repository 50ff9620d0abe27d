"""The topology file: written whole, read alike by every rank, refused when it is something else; and used by auto."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from moeweave.comm.dispatchers import select
from moeweave.comm.dispatchers.allgather import AllGatherDispatcher
from moeweave.comm.dispatchers.alltoall import AllToAllDispatcher
from moeweave.comm.dispatchers.select import choose, make_dispatcher
from moeweave.comm.topology import Topology
from run_ranks import run_ranks

TWO = Topology(
    device="cpu",
    device_names=["cpu", "cpu"],
    hosts=["one", "one"],
    links=[[None, "memory"], ["memory", None]],
    peer_access=[[None, True], [True, None]],
    pair_gbps=[[None, 2.5], [2.25, None]],
    all_to_all_gbps=1.0,
    all_gather_gbps=4.0,
    all_to_all_us=150.0,
    measured_bytes=1 << 20,
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    TWO.save(tmp_path / "deep" / "topology.json")
    assert Topology.load(tmp_path / "deep" / "topology.json") == TWO
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["topology.json"]
    assert (TWO.num_ranks, TWO.num_hosts, TWO.is_one_memory) == (2, 1, True)
    apart = replace(TWO, hosts=["one", "two"], peer_access=[[None, False], [False, None]])
    assert (apart.num_hosts, apart.is_one_memory) == (2, False)


@pytest.mark.parametrize(
    "content, text",
    [
        (None, r"topology \(.*\) must be a file. Write one with `moeweave-bench op=topology"),
        ("{", r"must be JSON \(.*\)"),
        ("[1]", "must hold format 1"),
        ('{"format": 1, "device": "cpu"}', "must hold format 1 and its fields alone"),
    ],
)
def test_another_content_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "topology.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=text):
        Topology.load(path)


def test_measured_bandwidths_decide() -> None:
    assert choose(2, 1, None, TWO)[0] == "allgather"  # half the bytes, but a quarter of the speed
    assert choose(2, 1, None, replace(TWO, all_gather_gbps=1.0))[0] == "alltoall"
    assert choose(2, 4, None, replace(TWO, all_to_all_gbps=16.0))[0] == "alltoall"  # twice the bytes, 4 times the speed
    assert choose(2, 1, None, TWO)[1] == (
        "top_k 1, ep 2, all-to-all 1, all-gather 4 GB/s measured: routed rows take 2.00 of gathered rows' time"
    )
    assert choose(4, 2, None, TWO) == choose(4, 2, None)  # measured on another number of ranks
    assert choose(2, 1, "prereduced", TWO)[0] == "allgather"
    assert choose(1, 1, None, TWO)[0] == "alltoall"


def test_auto_reads_the_first_ranks_file(tmp_path: Path) -> None:
    """Rank 1 has a file of its own that would make it choose otherwise, and then none at all."""
    TWO.save(tmp_path / "0.json")
    replace(TWO, all_to_all_gbps=100.0).save(tmp_path / "1.json")
    assert run_ranks(2, _auto, str(tmp_path / "{}.json")) == ["AllGatherDispatcher"] * 2
    (tmp_path / "1.json").unlink()
    assert run_ranks(2, _auto, str(tmp_path / "{}.json")) == ["AllGatherDispatcher"] * 2
    (tmp_path / "0.json").unlink()
    assert all("must be a file" in each for each in run_ranks(2, _auto, str(tmp_path / "{}.json")))


def _auto(path: str) -> str:
    """The choice among collectives: of ranks that share no memory."""
    group, shares_memory = dist.group.WORLD, select.shares_memory
    select.shares_memory = lambda group: False
    try:
        made = make_dispatcher("auto", group, 4, top_k=1, topology=path.format(dist.get_rank()))
    except ValueError as error:
        return str(error)
    finally:
        select.shares_memory = shares_memory
    assert isinstance(made, AllGatherDispatcher | AllToAllDispatcher)
    return type(made).__name__
