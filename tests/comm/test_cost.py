"""The closed form of a dispatch against rows counted from random routes, and against times over a shaped link.

Legend: T tokens a rank, K routes a token, E experts, W ranks, M nodes, L ranks of a node.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeweave.comm.cost import (
    MODELLED,
    Links,
    Tokens,
    decoded_rows,
    dispatch_cost,
    dispatch_rows,
    needed_parts,
    remote_ranks,
)
from moeweave.comm.nodes import Nodes
from moeweave.launch.bench.traffic import UNITS, count

MEASURED = Path(__file__).parents[1] / "results/network_dispatch.json"
TCP = 1448 / 1514  # payload of a full Ethernet frame: what a limit of the link leaves
FACTOR = 1.25


def counted(dispatcher: str, sizes: Tokens, nodes: Nodes) -> tuple[float, float]:
    """Rows across and inside of an average rank, from routes drawn at random."""
    size, generator = nodes.num_nodes * nodes.ranks_per_node, torch.Generator().manual_seed(0)
    across, inside = 0, 0
    for rank in range(size):
        ids_TK = torch.rand(sizes.tokens, sizes.experts, generator=generator).topk(sizes.top_k, dim=1).indices
        rows = count(ids_TK, rank, sizes.experts // size, nodes)[UNITS[dispatcher][0]]
        across, inside = across + rows.across, inside + rows.inside
    return across / size, inside / size


@pytest.mark.parametrize("dispatcher", MODELLED)
@pytest.mark.parametrize("nodes", [Nodes(1, 8), Nodes(2, 4), Nodes(4, 2), Nodes(8, 1), Nodes(4, 8)], ids=str)
@pytest.mark.parametrize("experts, top_k", [(256, 8), (32, 2), (64, 1)])
def test_rows_are_those_of_random_routes(dispatcher: str, nodes: Nodes, experts: int, top_k: int) -> None:
    sizes = Tokens(tokens=800, hidden=64, experts=experts, top_k=top_k)
    want = counted(dispatcher, sizes, nodes)
    assert dispatch_rows(dispatcher, sizes, nodes) == pytest.approx(want, rel=0.03)


def test_a_token_needs_all_parts_or_one() -> None:
    assert needed_parts(8, 8, 4) == 4
    assert needed_parts(8, 1, 4) == 1
    assert needed_parts(8, 0, 4) == 0
    assert needed_parts(256, 8, 1) == 1
    assert remote_ranks(256, 8, 4) == pytest.approx(2.71, abs=0.01)
    assert remote_ranks(256, 8, 1) == 0


def measured_links(found: dict) -> Links:
    """The link's limit; the copies' speed from the dispatch over memory alone, where all ranks shared the cores; the
    decoding's from what alltoall with fp8 took beyond the rest of the model."""
    sizes, nodes = tokens_of(found), Nodes(1, 8)
    copied = dispatch_cost("onesided", sizes, nodes, Links(network=1, local=1, latency=0)).seconds
    local = copied / median_of(found, "onesided") / found["nodes"]
    links = Links(network=200e6 / 8 * TCP, local=local, latency=1e-4)
    coded, two = tokens_of(found, "fp8"), Nodes(2, 4)
    rest = median_of(found, "alltoall fp8") - dispatch_cost("alltoall", coded, two, links).seconds
    made = decoded_rows("alltoall", coded, two) * coded.plain_bytes * two.ranks_per_node
    return replace(links, decode=made / rest)


def median_of(found: dict, backend: str) -> float:
    (line,) = [line for line in found["lines"] if line["backend"] == backend]
    return line["median"] / 1e6


def tokens_of(found: dict, form: str = "none") -> Tokens:
    config = found["context"]["config"]
    names = dict(tokens="tokens", hidden="hidden", experts="experts", top_k="topk")
    return Tokens(**{name: config[field] for name, field in names.items()}, format=form)


# Without alltoall with fp8, which the speed of decoding was taken from.
PREDICTED = [
    ("alltoall", "none"),
    *((name, form) for name in ("allgather", "hierarchical") for form in ("none", "fp8")),
]


@pytest.mark.parametrize("dispatcher, form", PREDICTED)
def test_times_are_those_over_a_shaped_link(dispatcher: str, form: str) -> None:
    found = json.loads(MEASURED.read_text())
    measured = median_of(found, dispatcher if form == "none" else f"{dispatcher} {form}")
    links = measured_links(found)
    assert 0 < links.decode < 4 * links.local
    cost = dispatch_cost(dispatcher, tokens_of(found, form), Nodes(2, 4), links)
    assert 1 / FACTOR < cost.seconds / measured < FACTOR


@pytest.mark.parametrize("nodes", [Nodes(1, 8), Nodes(2, 4), Nodes(4, 8)], ids=str)
def test_rows_that_are_decoded_are_those_that_random_routes_bring(nodes: Nodes) -> None:
    sizes, size = Tokens(tokens=800, hidden=64, experts=256, top_k=8), nodes.num_nodes * nodes.ranks_per_node
    for dispatcher, parts in (("onesided", size), ("hierarchical", nodes.num_nodes)):
        generator = torch.Generator().manual_seed(0)
        ids_TK = torch.rand(800, 256, generator=generator).topk(8, dim=1).indices
        there_TP = torch.zeros(800, parts).scatter_(1, ids_TK // (256 // parts), 1)
        assert decoded_rows(dispatcher, sizes, nodes) == pytest.approx(float(there_TP.sum()), rel=0.03)
    assert decoded_rows("alltoall", sizes, nodes) == 800 * 8 and decoded_rows("allgather", sizes, nodes) == 800 * size


def test_what_crosses_grows_with_nodes_and_is_least_by_node() -> None:
    sizes, links = Tokens(tokens=1024, hidden=1024, experts=2048, top_k=8), Links(network=1e9, local=1e11, latency=1e-5)
    by_node = [dispatch_cost("hierarchical", sizes, Nodes(each, 8), links) for each in (1, 2, 8, 64, 256)]
    assert by_node[0].network_bytes == 0
    assert all(a.network_bytes < b.network_bytes for a, b in itertools.pairwise(by_node))
    for num_nodes, cost in zip((2, 8, 64, 256), by_node[1:], strict=True):
        routed = dispatch_cost("alltoall", sizes, Nodes(num_nodes, 8), links)
        paired = dispatch_cost("onesided", sizes, Nodes(num_nodes, 8), links)
        assert cost.network_bytes < paired.network_bytes * 1.04 <= routed.network_bytes * 1.04


def test_an_unknown_dispatcher_is_refused() -> None:
    sizes, links = Tokens(tokens=1, hidden=8, experts=8, top_k=1), Links(network=1, local=1, latency=0)
    with pytest.raises(ValueError, match=r"dispatcher \('ascend'\) must be one of alltoall, allgather"):
        dispatch_cost("ascend", sizes, Nodes(1, 8), links)
