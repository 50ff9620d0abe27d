"""moeweave-bench op=overlap: every pairing is right and timed, corruption is noticed, and what is derived is exact."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moeweave.launch.bench import overlap, report
from moeweave.launch.bench.program import bench
from moeweave.launch.schema import BenchConfig
from run_ranks import run_ranks

PAIRINGS = [
    "all_to_all",
    "all_gather",
    "matmul",
    "all_to_all + all_gather",
    "all_to_all + matmul",
    "all_gather + matmul",
    "all_to_all + all_gather + matmul",
]


def lines(world: int, **values: Any) -> list[dict[str, Any]]:
    small = dict(op="overlap", device="cpu", iterations=3, warmup=1, min_size=96, max_size=960, factor=10)
    return bench(BenchConfig(**small, tokens=13, hidden=24, expert_hidden=16, **values), world)


def call_lines(world: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    return lines(world, **values)


@pytest.mark.parametrize("world", [2, 4])
def test_every_pairing_is_right_and_timed(world: int) -> None:
    found = run_ranks(world, call_lines, world, {})[0]
    assert [line["label"] for line in found] == PAIRINGS
    for line in found:
        assert line["wrong"] == 0
        assert list(line["sides"]) == line["label"].split(" + ")
        assert 0 < max(line["sides"].values()) <= line["median"] * 3
        assert ("slowdown" in line) == (" + " in line["label"])
    last = found[-1]
    assert last["size"] == 2 * 960
    assert last["factor"] == pytest.approx((world - 1) / world)
    assert last["busbw"] == pytest.approx(2 * 960 * (world - 1) / world / last["median"] / 1e3)
    assert all(math.isfinite(last[name]) for name in ("exposed", "concurrent"))
    context = {"device_name": "cpu", "ranks": world, "versions": {"torch": "2"}}
    assert "all_to_all" in report.table(found, context)


@pytest.mark.parametrize("world", [2, 4])
def test_one_lost_element_is_noticed_by_every_pairing_with_a_communication(world: int) -> None:
    values = dict(backend="bench_corrupt:Collectives", overlap=["broadcast", "all_reduce"])
    found = run_ranks(world, call_lines, world, values)[0]
    for line in found:
        assert (line["wrong"] > 0) == (line["label"] != "matmul"), line["label"]
        assert ("median" in line) == (line["label"] == "matmul")


def test_two_of_a_kind_are_two_sides() -> None:
    found = run_ranks(2, call_lines, 2, dict(overlap=["all_gather", "all_gather"]))[0]
    assert [line["label"] for line in found[:3]] == ["all_gather", "all_gather again", "matmul"]
    assert all(line["wrong"] == 0 for line in found)


def test_shares_follow_from_the_times_alone() -> None:
    def line(label: str, median: float, *sides: float) -> dict[str, Any]:
        names = label.split(" + ")
        return dict(
            op="overlap", backend="torch", label=label, median=median, sides=dict(zip(names, sides, strict=True))
        )

    found = [
        line("a", 100.0, 100.0),
        line("b", 60.0, 60.0),
        line("matmul", 80.0, 80.0),
        line("a + b", 130.0, 130.0, 90.0),
        line("a + matmul", 100.0, 100.0, 96.0),
        line("b + matmul", 150.0, 60.0, 150.0),
        line("a + b + matmul", 240.0, 240.0, 120.0, 80.0),
    ]
    overlap.relate(found)
    assert "slowdown" not in found[0]
    assert found[3]["slowdown"] == {"a": 1.3, "b": 1.5}
    assert (found[3]["exposed"], found[3]["concurrent"]) == (30.0, 0.5)  # 30 of the shorter one's 60 were hidden
    assert found[4]["slowdown"] == {"a": 1.0, "matmul": 1.2}
    assert (found[4]["exposed"], found[4]["concurrent"]) == (20.0, 1.0)  # beyond the product alone
    assert found[5]["concurrent"] == pytest.approx(-10 / 60)  # together is worse than one after the other
    assert (found[6]["exposed"], found[6]["concurrent"]) == (160.0, 0.0)
