"""moeweave-bench op=moe_layer ablate=true: every way is right, counted as it should be, and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moeweave.comm.timeline import STREAMS
from moeweave.launch.bench import report
from moeweave.launch.bench.ablation_ways import NodeIngredients, WindowIngredients
from moeweave.launch.bench.ablation_ways import ways as all_ways
from moeweave.launch.bench.program import bench
from moeweave.launch.schema import BenchConfig
from run_ranks import run_ranks


def lines(world: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    small = dict(tokens=13, hidden=32, experts=8, topk=3, expert_hidden=16, shared_hidden=24, iterations=2, warmup=1)
    return bench(BenchConfig(op="moe_layer", ablate=True, device="cpu", **small, **values), world)


@pytest.mark.parametrize("world, codec, share", [(2, "none", 0.5), pytest.param(4, "fp8", 1.0, marks=pytest.mark.slow)])
def test_every_way_is_right_and_counted(world: int, codec: str, share: float, tmp_path: Path) -> None:
    found = run_ranks(world, lines, world, dict(codec=codec, push_share=share))[0]
    ways = {line["backend"]: line for line in found if "ablation" in line}
    assert list(ways) == [way.name for way in all_ways(WindowIngredients())] and len(ways) == 12
    assert all(line["wrong"] == 0 for line in found)
    none, every = ways["none"], ways["all"]
    assert none["gain"] == 1.0 and none["peak_memory"] > 13 * 32 * 4
    assert none["ablation"]["router_flops"] == world * every["ablation"]["router_flops"] == world * 2 * 13 * 32 * 8
    assert none["ablation"]["shared_flops"] == world * every["ablation"]["shared_flops"]
    assert none["wire_bytes"] - every["wire_bytes"] == world * (world - 1) * 13 * (32 * 4 - 32 - 4)
    assert none["wire_bytes"] == ways["windows"]["wire_bytes"] == world * (world - 1) * 13 * (2 * 32 * 4 + 3 * 12)
    assert none["sides"]["dma"] == 0.0 and (every["sides"]["dma"] > 0) == (share < 1)
    assert "slowdown" in every and "slowdown" not in none
    text = report.table(found, {"device_name": "cpu", "ranks": world, "versions": {"torch": "2"}})
    assert "all but two_planes" in text and "all but windows" in text
    assert "# rows over collectives, on push" in text and "# rows over windows, on push" in text
    report.write(found, tmp_path)
    for name in ("none", "all"):
        assert (tmp_path / f"timeline-{name}.png").stat().st_size > 0
        events = json.loads((tmp_path / f"timeline-{name}.json").read_text())["traceEvents"]
        assert {event["tid"] for event in events} <= set(STREAMS)
        assert {"router", "shared expert", "experts", "rows", "results"} <= {event["name"] for event in events}


def between_nodes(world: int) -> list[dict[str, Any]]:
    """The second half of the ranks say that they are on another host."""
    from moeweave.comm import nodes, peers

    if dist.get_rank() >= world // 2:
        nodes.host_name = peers.host_name = lambda: "elsewhere"
    return lines(world, dict(backend="hierarchical", codec="fp8", num_parts=3))


def test_every_way_between_nodes_is_right_and_counted() -> None:
    found = run_ranks(4, between_nodes, 4, fresh=True)[0]
    ways = {line["backend"]: line for line in found if "ablation" in line}
    assert list(ways) == [way.name for way in all_ways(NodeIngredients())] and len(ways) == 12
    assert all(line["wrong"] == 0 for line in found)
    none, every = ways["none"], ways["all"]
    assert none["ablation"]["router_flops"] == 4 * every["ablation"]["router_flops"]
    sent = {name: line["network_bytes"] for name, line in ways.items()}
    # Top-3 of 8 experts on 2 nodes: some tokens need both experts of a rank of the other node, or both its ranks.
    assert sent["all"] < sent["all but by_node"] < sent["none"] and sent["all"] < sent["all but quantise"]
    assert sent["all"] == sent["all but two_planes"] == sent["all but overlap"] < sent["all but rank_local"]
    assert "all but by_node" in report.table(found, {"device_name": "cpu", "ranks": 4, "versions": {"torch": "2"}})
