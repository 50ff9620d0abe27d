"""moeweave-bench op=topology: a file with everything that was measured, and none where a result was wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moeweave.comm.topology import Topology
from moeweave.launch.bench import report
from moeweave.launch.bench.program import bench
from moeweave.launch.bench.topology import parse_links
from moeweave.launch.schema import BenchConfig
from run_ranks import run_ranks


def lines(world: int, path: str, backend: str | None) -> list[dict[str, Any]]:
    small = dict(device="cpu", iterations=2, warmup=1, min_size=96, max_size=960, factor=10)
    return bench(BenchConfig(op="topology", topology=path, backend=backend, **small), world)


@pytest.mark.parametrize("world", [2, 4])
def test_the_file_holds_what_was_measured(tmp_path: Path, world: int) -> None:
    path = tmp_path / "topology.json"
    found = run_ranks(world, lines, world, str(path), None)[0]
    assert all(line["wrong"] == 0 for line in found)
    topology = Topology.load(path)
    assert (topology.device, topology.num_ranks, topology.num_hosts) == ("cpu", world, 1)
    assert topology.is_one_memory
    by_label = {line["label"]: line for line in found}
    for a in range(world):
        for b in range(world):
            here = (topology.links[a][b], topology.peer_access[a][b], topology.pair_gbps[a][b])
            assert here == ((None,) * 3 if a == b else ("memory", True, by_label[f"{a}->{b}"]["busbw"]))
    assert topology.all_to_all_gbps == by_label["all_to_all"]["busbw"]
    assert topology.all_gather_gbps == by_label["all_gather"]["busbw"]
    assert topology.all_to_all_us == by_label["all_to_all, smallest"]["median"]
    assert topology.measured_bytes == 960
    assert (topology.push_gbps, topology.dma_gbps) == tuple(by_label[name]["busbw"] for name in ("push", "dma"))
    assert topology.push_gbps > 0 and topology.dma_gbps > 0 and topology.push_sms == 0
    table = report.table(found, found[0]["context"])
    assert "GB/s, torch, 960 bytes, from (down) to (across)" in table
    assert "link, from (down) to (across)" in table


def on_two_hosts_of_one_name(path: str) -> None:
    """Ranks 2 and 3 share no memory with the others, under the same host name."""
    from moeweave.comm import nodes, peers
    from moeweave.launch.bench import topology

    if dist.get_rank() >= 2:
        nodes.host_name = peers.host_name = topology.host_name = lambda: "elsewhere"
    lines(4, path, None)


def test_hosts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    run_ranks(4, on_two_hosts_of_one_name, str(tmp_path / "topology.json"), fresh=True)
    topology = Topology.load(tmp_path / "topology.json")
    assert topology.nodes == [0, 0, 2, 2] and not topology.is_one_memory
    assert topology.push_gbps is topology.dma_gbps is None
    assert topology.links[0] == [None, "memory", "network", "network"]


@pytest.mark.parametrize("world", [2, 4])
def test_nothing_is_written_where_a_result_was_wrong(tmp_path: Path, world: int) -> None:
    path = tmp_path / "topology.json"
    found = run_ranks(world, lines, world, str(path), "bench_corrupt:Collectives")[0]
    own = [line for line in found if line["backend"] not in ("push", "dma")]
    assert own and all(line["wrong"] > 0 and "median" not in line for line in own)
    assert not path.exists()


def test_links_as_the_driver_prints_them() -> None:
    printed = (
        "\x1b[4m\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        "GPU0\t X \tNV18\tPIX\t0-31\t0\tN/A\n"
        "GPU1\tNV18\t X \tSYS\t32-63\t1\tN/A\n"
        "NIC0\tPIX\tSYS\t X \n\n"
        "Legend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
    )
    assert parse_links(printed) == {0: ["X", "NV18"], 1: ["NV18", "X"]}
    assert parse_links("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n") == {0: ["X"]}
    assert parse_links("No devices were found\n") == {}
