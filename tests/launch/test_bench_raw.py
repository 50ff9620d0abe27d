"""moeweave-bench op=raw: both planes put every byte where it belongs, corruption is noticed, sizes are a dispatch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeweave.launch.bench import shapes
from moeweave.launch.bench.program import bench
from moeweave.launch.schema import BenchConfig
from programs import run
from run_ranks import run_ranks

SMALL = dict(device="cpu", iterations=2, warmup=1, min_size=6, max_size=6000, factor=1000)


def lines(world: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    return bench(BenchConfig(**SMALL | values), world)


@pytest.mark.parametrize("world", [2, 4])
def test_both_planes_are_right_and_timed(world: int) -> None:
    found = run_ranks(world, lines, world, dict(op="raw"))[0]
    small, large = 16 * (world - 1), 6000
    sizes = [(name, size) for size in (small, large) for name in ("torch", "push", "dma")]
    assert [(line["backend"], line["size"]) for line in found] == sizes
    for line in found:
        assert line["wrong"] == 0
        assert line["count"] == line["size"] // (world - 1)
        assert line["algbw"] == line["busbw"] == pytest.approx(line["size"] / line["median"] / 1e3)
    found = run_ranks(world, lines, world, dict(op="overlap", overlap=["push", "dma"], tokens=5))[0]
    assert all(line["wrong"] == 0 for line in found)
    assert found[3]["label"] == "push + dma"
    assert found[3]["factor"] == 1.0


@pytest.mark.parametrize("world", [2, 4])
def test_one_lost_byte_is_noticed(world: int) -> None:
    found = run_ranks(world, lines, world, dict(op="raw", backend=["bench_corrupt:Plane", "push"]))[0]
    assert [line["wrong"] for line in found] == [1, 0, 1, 0]
    assert ["median" in line for line in found] == [False, True, False, True]


def test_a_number_of_programs_is_in_the_lines_of_push_alone() -> None:
    found = run_ranks(2, lines, 2, dict(op="raw", programs=8, max_size=6))[0]
    assert {line["backend"]: line.get("programs") for line in found} == {"torch": None, "push": 8, "dma": None}


def test_a_shape_means_the_bytes_that_must_leave_in_its_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shapes.Shape(37, 24, 8, 3, 16)
    monkeypatch.setitem(shapes.SHAPES, "small", shape)
    # All tokens go to experts 0, 1 (rank 0) and 2 (rank 1): once from ranks 0 and 1, twice from ranks 2 and 3.
    config = BenchConfig(shape="small", routing="one_hot", dtype="bfloat16")
    assert shapes.crossing_bytes(config, 4) == 37 * 6 // 4 * 24 * 2
    # Three experts in a row of 8 on 4 ranks of 2: a token needs two ranks, one of which may be its own.
    balanced = BenchConfig(shape="small", routing="balanced", dtype="bfloat16")
    assert 37 * 24 * 2 <= shapes.crossing_bytes(balanced, 4) <= 37 * 24 * 2 * 2
    # Top-8 of 256 on 4 ranks: a rank is needed unless all 8 are elsewhere, about 1 - 0.75 ** 8, and 3 are remote.
    config = BenchConfig(shape="v3-decode128", dtype="bfloat16")
    assert shapes.crossing_bytes(config, 4) / (128 * 7168 * 2) == pytest.approx(3 * (1 - 0.75**8), abs=0.05)


@pytest.mark.gpu
@pytest.mark.ranks(2)
@pytest.mark.parametrize("extra", [[], ["graph=true"], ["programs=8"]])
def test_on_gpus(tmp_path: Path, extra: list[str]) -> None:
    arguments = ["op=[raw,overlap]", "overlap=[push,dma]", "min_size=4096", "max_size=1048576", "factor=16", "ranks=2"]
    done = run("bench", *arguments, *extra, cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    assert "# Out of bounds values : 0 OK" in done.out
