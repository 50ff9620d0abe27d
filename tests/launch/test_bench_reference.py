"""The command that writes every figure of a machine: what it runs, and one whole pass on small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeweave.launch import compose
from moeweave.launch.bench import program, reference, routed, shapes
from moeweave.launch.schema import BenchConfig
from programs import run


@pytest.mark.parametrize("on_cuda", [True, False])
def test_every_run_can_start(on_cuda: bool) -> None:
    runs = [reference.merged(each, ["out=runs/x", "ranks=4"]) for each in reference.runs(on_cuda)]
    configs = [compose.load(BenchConfig, "bench", each) for each in runs]
    for config in configs:
        assert config.graph <= on_cuda
        for op in config.ops:
            program.OPS[op].check(op, config, 4)
    moe = [config.shape for config in configs if config.ops == list(routed.OPS)]
    assert moe == list(shapes.SHAPES)
    assert [config.shape for config in configs if config.ops == ["raw"]][:6] == list(shapes.SHAPES)


def test_given_arguments_replace_those_of_the_runs() -> None:
    moe, links = [reference.MOE, "backend=[alltoall]", "shape=a"], [reference.LINKS, "factor=16"]
    given = ["backend=[alltoall,torchtitan]", "factor=4", "out=x"]
    assert reference.merged(moe, given) == [reference.MOE, "shape=a", *given]
    assert reference.merged(links, given) == [reference.LINKS, "factor=4", "out=x"]


@pytest.mark.parametrize("arguments, text", [([], "out is missing"), (["out=x", "ranks=1"], "must be at least 2")])
def test_what_cannot_run_is_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert reference.main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_all_lines_go_to_one_file(tmp_path: Path) -> None:
    arguments = ["out=files", "device=cpu", "iterations=1", "warmup=0", "min_size=2048", "max_size=2048"]
    done = run("bench_small_reference", *arguments, cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    lines = [json.loads(line) for line in (tmp_path / "files/bench.jsonl").read_text().splitlines()]
    ops = dict.fromkeys(line["op"] for line in lines)
    links = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "send_recv_both"]
    assert list(ops) == ["peak", *routed.OPS, "raw", *links, "overlap", "topology"]
    assert all(line["wrong"] == 0 for line in lines)
    assert (tmp_path / "files/topology.json").exists()
