"""Nodes of a group, the groups between and inside them, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moeweave.comm.dispatchers.hierarchical import HierarchicalDispatcher
from moeweave.comm.dispatchers.select import choose, make_dispatcher
from moeweave.comm.nodes import Nodes
from run_ranks import run_ranks


def test_nodes_from_the_names_of_hosts() -> None:
    assert Nodes.of(["b", "b", "a", "a"]) == Nodes(2, 2)
    assert Nodes.of(["a"] * 3) == Nodes(1, 3)


@pytest.mark.parametrize("names", [(0, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1)])
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


def test_auto_finds_hosts_by_itself() -> None:
    for rows in run_ranks(4, on_two_hosts, fresh=True):
        assert rows == [0, 1, 2, 3]


def test_exact_is_refused() -> None:
    with pytest.raises(ValueError, match=r"combine \('exact'\) must be one of prereduced"):
        make_dispatcher("hierarchical", None, 8, combine="exact")
