"""Nodes of a group, the groups between and inside them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from faked_nodes import write_nodes
from moeweave.comm.dispatchers.hierarchical import HierarchicalDispatcher
from moeweave.comm.dispatchers.select import choose, make_dispatcher
from moeweave.comm.nodes import Nodes
from moeweave.comm.topology import Topology
from run_ranks import run_ranks


def test_nodes_from_the_names_of_hosts() -> None:
    assert Nodes.of(["b", "b", "a", "a"]) == Nodes(2, 2)
    assert Nodes.of(["a"] * 3) == Nodes(1, 3)


@pytest.mark.parametrize("names", [(0, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1), (0, 0, 1, 1, 2), (0, 0, 1, 1, 1, 2)])
def test_uneven_or_mixed_nodes_are_refused(names: tuple[int, ...]) -> None:
    shown = ", ".join(map(str, names))
    with pytest.raises(ValueError, match=rf"nodes \({shown}\) must hold equally many ranks .* dispatcher='alltoall'"):
        Nodes.of(names)


def test_auto_picks_it_between_hosts_of_several_ranks() -> None:
    assert choose(8, 8, None, nodes=Nodes(2, 4))[0] == "hierarchical"
    assert choose(8, 8, "prereduced", nodes=Nodes(2, 4))[0] == "hierarchical"
    assert choose(8, 8, "exact", nodes=Nodes(2, 4))[0] == "alltoall"
    assert choose(8, 8, None, nodes=Nodes(8, 1))[0] == "alltoall"
    assert choose(8, 8, None, shared=True, nodes=Nodes(1, 8))[0] == "onesided"


def on_two_hosts() -> list[str]:
    """Ranks 2 and 3 say that they are on another host."""
    from moeweave.comm import nodes, peers

    if dist.get_rank() >= 2:
        nodes.host_name = peers.host_name = lambda: "elsewhere"
    group = dist.new_group()
    made = make_dispatcher("auto", group, 8, top_k=4)
    assert isinstance(made, HierarchicalDispatcher)
    assert made.nodes == Nodes(2, 2)
    ids_TK = torch.tensor([[0, 3, 4, 7]])
    rows_RD = made.dispatch(torch.full((1, 3), float(dist.get_rank())), ids_TK, torch.ones(1, 4)).rows_RD
    return rows_RD[:, 0].tolist()


def on_uneven_hosts() -> list[str]:
    from moeweave.comm import nodes, peers

    place = max(0, dist.get_rank() - 1)  # ranks 0 and 1 on one host, 2 and 3 on one each
    nodes.host_name = peers.host_name = lambda: f"host{place}"
    kinds = [type(make_dispatcher("auto", dist.new_group(), 8, top_k=top_k)).__name__ for top_k in (2, 8)]
    try:
        make_dispatcher("hierarchical", dist.new_group(), 8)
    except ValueError as error:
        kinds.append(str(error))
    return kinds


def test_uneven_hosts_leave_the_collectives() -> None:
    for routed, gathered, refused in run_ranks(4, on_uneven_hosts, fresh=True):
        assert (routed, gathered) == ("AllToAllDispatcher", "AllGatherDispatcher")
        assert "nodes (0, 0, 1, 2) must hold equally many ranks" in refused and "dispatcher='alltoall'" in refused


def test_auto_finds_hosts_by_itself() -> None:
    for rows in run_ranks(4, on_two_hosts, fresh=True):
        assert rows == [0, 1, 2, 3]


def lie_of(name: str, path: str, top_k: int | None = None) -> str:
    """The dispatcher's kind and nodes, or why there is none."""
    group = dist.new_group()
    try:
        made = make_dispatcher(name, group, 8, top_k=top_k or dist.get_rank() + 1, topology=path)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return f"{type(made).__name__} {getattr(made, 'nodes', None)}"


@pytest.mark.parametrize("name", ["auto", "hierarchical"])
def test_the_topology_file_says_which_ranks_share_a_node(name: str, tmp_path: Path) -> None:
    for nodes, shown in (((0, 0, 1, 1), Nodes(2, 2)), ((0, 1, 2, 3), Nodes(4, 1))):
        path = write_nodes(tmp_path, nodes)
        assert Topology.load(path).nodes == [nodes.index(node) for node in nodes]
        found = run_ranks(4, lie_of, name, path, 1)
        if shown.ranks_per_node == 1 and name == "auto":
            assert found == ["AllGatherDispatcher None"] * 4, "by the bandwidths of the file"
        else:
            assert found == [f"HierarchicalDispatcher {shown}"] * 4


def test_a_file_of_another_number_of_ranks_leaves_the_hosts(tmp_path: Path) -> None:
    path = write_nodes(tmp_path, (0, 0, 1, 1, 2, 2))
    assert run_ranks(4, lie_of, "hierarchical", path, 1) == [f"HierarchicalDispatcher {Nodes(1, 4)}"] * 4
    assert run_ranks(4, lie_of, "auto", path, 1) == ["OneSidedDispatcher None"] * 4


def on_other_hosts(name: str, path: str) -> str:
    from moeweave.comm import nodes, peers

    if dist.get_rank() == 1:
        nodes.host_name = peers.host_name = lambda: "elsewhere"
    return lie_of(name, path, 1)


def test_a_node_of_the_file_must_be_one_host(tmp_path: Path) -> None:
    path = write_nodes(tmp_path, (0, 0, 1, 1))
    for name in ("auto", "hierarchical"):
        for text in run_ranks(4, on_other_hosts, name, path, fresh=True):
            assert text.startswith("topology: ranks 0 and 1 of the expert group must be on one host")
            assert "moeweave-bench op=topology" in text


def test_uneven_nodes_of_the_file(tmp_path: Path) -> None:
    path = write_nodes(tmp_path, (0, 0, 0, 1))
    for text in run_ranks(4, lie_of, "hierarchical", path, 1):
        assert "nodes (0, 0, 0, 1) must hold equally many ranks" in text
    assert run_ranks(4, lie_of, "auto", path, 1) == ["OneSidedDispatcher None"] * 4


def test_ranks_that_choose_differently_are_told(tmp_path: Path) -> None:
    """Ranks pass another top-k each, by which the file's bandwidths choose."""
    path = write_nodes(tmp_path, (0, 1))
    texts = run_ranks(2, lie_of, "auto", path)
    assert len(set(texts)) == 1
    assert "must be the same on all ranks of the expert group: rank 0 has allgather (top_k 1" in texts[0]
    assert "rank 1 allgather (top_k 2" in texts[0] and "Pass the same plan" in texts[0]


def test_exact_is_refused() -> None:
    with pytest.raises(ValueError, match=r"combine \('exact'\) must be one of prereduced"):
        make_dispatcher("hierarchical", None, 8, combine="exact")
