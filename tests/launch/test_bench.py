"""moeweave-bench: operations right on CPU ranks, corruption noticed, figures as nccl-tests define them."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch

from moeweave.launch.bench import ascend, collectives, report, routed, shapes
from moeweave.launch.bench.case import Case, Work
from moeweave.launch.bench.measure import Times, figures
from moeweave.launch.bench.program import bench, check, main
from moeweave.launch.schema import BenchConfig, ConfigError
from programs import ROOT, fresh, run
from run_ranks import run_ranks

COLLECTIVES = list(collectives.FACTORS)
OURS = [name for name in routed.BACKENDS if name not in ("torchtitan", *ascend.NAMES)]
SMALL = dict(device="cpu", iterations=2, warmup=1, min_size=96, max_size=960, factor=10)
MOE = dict(tokens=37, hidden=24, experts=8, topk=3, expert_hidden=16)


def lines(world: int, **values: Any) -> list[dict[str, Any]]:
    return bench(BenchConfig(**{**SMALL, **MOE, **values}), world)


def on_ranks(world: int, **values: Any) -> list[dict[str, Any]]:
    """The lines of rank 0; all ranks must have the same."""
    found = run_ranks(world, call_lines, world, values)
    keep = ("op", "backend", "size", "wrong", "median", "logical_bytes", "wire_bytes")
    assert all([[line.get(k) for k in keep] for line in each] == [[line.get(k) for k in keep] for line in found[0]]
               for each in found)  # fmt: skip
    return found[0]


def call_lines(world: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    return lines(world, **values)


@pytest.mark.parametrize("world", [2, 4])
def test_every_collective_is_right_and_timed(world: int) -> None:
    found = on_ranks(world, op=COLLECTIVES)
    assert {line["op"] for line in found} == set(COLLECTIVES)
    assert all(line["wrong"] == 0 and len(line["times"]) == 2 and line["median"] > 0 for line in found)
    assert {line["op"] for line in found if line["in_place"]} == set(collectives.IN_PLACE)
    pairs = {line["label"] for line in found if line["op"] == "pairs"}
    assert len(pairs) == world * (world - 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_moe_operation_is_right_and_timed(world: int, dtype: str) -> None:
    found = on_ranks(world, op=list(routed.OPS), backend=OURS, dtype=dtype)
    peaks = [(line["backend"], line["label"]) for line in found if line["op"] == "peak"]
    assert peaks == [("torch", "equal blocks"), ("push", "raw"), ("dma", "raw")]
    assert len(found) == 3 + len(routed.OPS) * len(OURS)
    assert max(line["of_peak"] for line in found if line["op"] == "peak") == 1
    assert all(line["wrong"] == 0 and line["median"] > 0 for line in found)
    assert all(line["of_peak"] > 0 and line["ratio"] > 0 for line in found)
    assert all(line["ratio"] == 1 for line in found if line["backend"] == "alltoall")


@pytest.mark.parametrize("routing", ["balanced", "zipf", "one_hot"])
def test_skewed_routes_are_right(routing: str) -> None:
    found = on_ranks(2, op=list(routed.OPS), backend=["alltoall", "allgather"], routing=routing)
    assert all(line["wrong"] == 0 for line in found)
    if routing == "one_hot":  # experts 0, 1, 2 are all on rank 0: only rank 1's tokens leave, once each
        dispatch = next(line for line in found if line["op"] == "dispatch")
        assert dispatch["logical_bytes"] == 37 * 24 * 4
        assert dispatch["wire_bytes"] == 3 * 37 * 24 * 4


CODED = ["none", "fp8", "int8", {"dispatch": "fp8", "combine": "fp8", "dispatch_backward": "fp8_e5m2"}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codecs_are_lines_of_their_own(dtype: str) -> None:
    found = on_ranks(2, op=list(routed.OPS), backend=OURS, codec=CODED, dtype=dtype, routing="balanced")
    assert all(line["wrong"] == 0 and line["median"] > 0 for line in found)
    lines_of = {(line["op"], line["backend"]): line["wire_bytes"] for line in found if line["op"] in routed.OPS}
    assert len(lines_of) == len(routed.OPS) * len(OURS) * len(CODED)
    size, all_fp8 = getattr(torch, dtype).itemsize, "alltoall dispatch=fp8 combine=fp8 dispatch_backward=fp8_e5m2"
    rows = lines_of["combine", "alltoall fp8"] // (24 * size)
    assert lines_of["dispatch", "alltoall"] == rows * 24 * size
    assert lines_of["dispatch", "alltoall fp8"] == lines_of["dispatch", "alltoall int8"] == rows * 32
    assert lines_of["moe_layer", all_fp8] == rows * 64
    assert lines_of["moe_layer_backward", all_fp8] == rows * (96 + 24 * size)


@pytest.mark.parametrize("backend, codec", [("dispatching", "fp8"), ("combining", {"combine": "fp8"})])
def test_a_lost_row_is_noticed_through_a_codec(backend: str, codec: Any) -> None:
    ops = ["dispatch" if backend == "dispatching" else "combine", "moe_layer"]
    found = on_ranks(2, op=ops, backend=f"bench_corrupt:coded_{backend}", codec=codec)
    assert all(line["wrong"] > 0 and "median" not in line for line in found if line["op"] in ops)


@pytest.mark.parametrize(
    "codec, backend, text",
    [
        ("fp9", "alltoall", r"codec=fp9: codec \('fp9'\) must be one of none, fp8"),
        ({"dispatch": "fp8", "scale": "group128"}, "alltoall", r"width \(24\) must be a multiple of 128"),
        ("fp8", "bench_corrupt:dispatching", r"backend=bench_corrupt:dispatching takes none\. Add alltoall"),
    ],
)
def test_codecs_that_cannot_run_are_refused(codec: Any, backend: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        routed.check("dispatch", BenchConfig(**MOE, codec=codec, backend=backend), 2)


@pytest.mark.parametrize("world", [2, 4])
def test_one_lost_element_is_noticed_by_every_operation(world: int) -> None:
    found = on_ranks(world, op=COLLECTIVES, backend="bench_corrupt:Collectives")
    assert {line["op"] for line in found} == set(COLLECTIVES)
    assert all(line["wrong"] > 0 and "median" not in line for line in found)
    for op, backend in [("dispatch", "dispatching"), ("combine", "combining")]:
        layers = [op, "moe_layer", "moe_layer_backward"]
        found = on_ranks(world, op=layers, backend=f"bench_corrupt:{backend}")[3:]  # without the peaks
        assert [line["op"] for line in found] == layers
        assert all(line["wrong"] > 0 and "median" not in line for line in found)


def test_bandwidths_are_those_of_nccl_tests() -> None:
    split = ("all_gather", "reduce_scatter", "all_to_all", "all_to_all_v")
    straight = ("broadcast", "send_recv", "send_recv_both", "pairs")
    for world in (2, 3, 4, 8):
        want = {"all_reduce": 2 * (world - 1) / world, **dict.fromkeys(split, (world - 1) / world)}
        assert {op: factor(world) for op, factor in collectives.FACTORS.items()} == want | dict.fromkeys(straight, 1.0)
    nothing = Work(lambda: None, lambda: None, lambda: 0)
    case = Case("all_reduce", "torch", 8_000_000, 2_000_000, "float32", nothing, factor=1.5)
    times = np.array([90.0, 100.0, 200.0])
    found = figures(Times(times, times / 10, {}), case, None, 4)
    assert (found["median"], found["min"], found["mean"], found["host"]) == (100.0, 90.0, 130.0, 10.0)
    assert (found["algbw"], found["busbw"]) == (80.0, 120.0)  # 8 MB in 100 us
    assert found["p95"] == pytest.approx(190.0)
    moe = figures(Times(times, times, {}), case, 4_000_000, 4)  # a rank sends 1 MB in 100 us
    assert moe["busbw"] == 10.0


@pytest.mark.parametrize("routing", ["uniform", "balanced", "zipf", "one_hot"])
def test_routes_are_distinct_and_follow_from_the_rank_alone(routing: str) -> None:
    config = BenchConfig(**MOE, routing=routing)
    shape = shapes.shape_of(config)
    ids_TK, weights_TK = shapes.route(config, shape, 1)
    assert ids_TK.shape == weights_TK.shape == (37, 3)
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 8 for row in ids_TK.tolist())
    assert torch.equal(ids_TK, shapes.route(config, shape, 1)[0])
    counts = torch.bincount(ids_TK.reshape(-1), minlength=8)
    if routing == "balanced":
        assert int(counts.max() - counts.min()) <= 1
    if routing == "one_hot":
        assert counts.tolist() == [37, 37, 37, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["op=all_recude"], "op=all_recude: must be one of all_reduce"),
        (["op=all_gather", "ranks=3", "min_size=1000"], "Set min_size=1008"),
        (["ranks=1"], "must be at least 2"),
        (["graph=true"], "CUDA graphs need a CUDA device"),
        (["op=overlap", "overlap=[all_to_all,pairs]"], "must be two of all_reduce, all_gather"),
        (["op=overlap", "ranks=3", "max_size=1000", "min_size=1000"], "must be multiples of 12"),
        (["op=topology", "min_size=1025", "max_size=4096"], "Set min_size=1032"),
        (["op=raw", "backend=nccl"], "must be one of torch, push, dma with op=raw"),
        (["op=dispatch", "backend=torchtitan"], "runs on CUDA devices only"),
        (["compare", "one.jsonl"], "the following arguments are required: new"),
        (["op=dispatch", "experts=9"], "must be divisible by the 2 ranks"),
        (["op=dispatch", "shape=v4"], "must be one of v3-prefill"),
        (["op=overlap", "shape=v4"], "must be one of v3-prefill"),
        (["op=raw", "shape=mixtral-prefill", "ranks=3"], "must be divisible by the 3 ranks"),
        (["device=npu"], "this machine's accelerator is"),
        (["device=gpu"], "must be one of cuda, npu, cpu"),
        (["op=dispatch", "backend=alltoal"], "must be one of alltoall, allgather"),
        (["op=dispatch", "backend=no.such:thing"], "Name an importable module"),
        (["routing=zip"], "Did you mean routing=zipf?"),
        (["opp=all_reduce"], "Did you mean"),
        (["op=[]"], "names no operation"),
        (["op=null"], "names no operation"),
        (["dtype=int8"], "must be one of float32, bfloat16, float16"),
        (["backend=nccl"], "must be one of torch, hccl with op=all_reduce"),
        (["codec=fp8"], "op=all_reduce does not read it. Leave it out, or use dispatch"),
        (["op=dispatch", "ablate=true"], "op=dispatch does not read it. Leave it out, or use moe_layer."),
        (["num_sms=3"], "num_sms: must be a list"),
        (["op=raw", "programs=0"], "must be at least 1"),
        (["op=dispatch", "experts=9"], "Set ranks to 3, 9 or experts=10."),
        (["op=overlap", "average=true"], "times each iteration's sides"),
        (["out=pyproject.toml/files"], "pyproject.toml cannot hold it"),
        (["op=topology", "topology=pyproject.toml/files"], "pyproject.toml cannot hold it"),
        (["compare", "one.jsonl", "two.jsonl", "--threshold=-1"], "threshold=-1.0: must be at least 0"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    capsys: Any, monkeypatch: Any, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments if arguments[0] == "compare" else ["device=cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_the_program_writes_table_lines_csv_and_picture(tmp_path: Any) -> None:
    arguments = ["op=[all_reduce,dispatch]", "device=cpu", "max_size=4096", "iterations=3", "tokens=40", "out=files"]
    for _ in range(2):
        done = run("bench", *arguments, "trace=traces", cwd=tmp_path)
        assert (done.code, done.left) == (0, ()), done.err
    assert "# Out of bounds values : 0 OK" in done.out
    assert "algbw    busbw  #wrong" in done.out
    folder = tmp_path / "files"
    kept = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    assert len(kept) == 2 * (3 + 2 * 2 + 1)  # the peaks, two sizes in and out of place, one dispatch; two runs
    assert {"git", "versions", "device_name", "config"} <= kept[0]["context"].keys()
    assert (folder / "bench.csv").read_text().startswith("op,backend,label,size")
    assert (folder / "bench.png").stat().st_size > 5000
    for rank in (0, 1):
        traces = sorted(path.name for path in (tmp_path / f"traces/rank{rank}").iterdir())
        assert traces == [
            "all_reduce_torch_1024.json",
            "all_reduce_torch_1024_in_place.json",
            "all_reduce_torch_4096.json",
            "all_reduce_torch_4096_in_place.json",
            "dispatch_alltoall_T40_D256_E16_K4.json",
            "peak_dma_raw.json",
            "peak_push_raw.json",
            "peak_torch_equal_blocks.json",
        ]
        events = json.loads((tmp_path / f"traces/rank{rank}" / traces[0]).read_text())["traceEvents"]
        named = [event.get("name") for event in events]
        assert named.count("run") == named.count("flush and barrier") == 3
        assert "time: all_reduce torch 1024" in named


def test_compare_names_what_became_slower(tmp_path: Any, capsys: Any) -> None:
    line = dict(op="all_reduce", backend="torch", label="", size=64, dtype="float32", in_place=False, ranks=2)
    for name, times in (("old", (100.0, 100.0)), ("new", (104.0, 150.0)), ("wrong", (None, 100.0))):
        found = [dict(line, size=size, median=time) for size, time in zip((64, 128), times, strict=True)]
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in found))
    old, new, wrong = (str(tmp_path / name) for name in ("old", "new", "wrong"))
    assert main(["compare", old, old]) == 0
    assert main(["compare", old, new]) == 1
    assert main(["compare", old, new, "--threshold", "0.6"]) == 0
    assert main(["compare", old, wrong]) == 1
    assert main(["compare", old, str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert "+50.0%  SLOWER" in captured.out and "WRONG" in captured.out
    assert "does not exist" in captured.err


def test_npus_get_the_names_and_columns_of_hccl_test() -> None:
    line = dict(
        op="all_reduce", backend="torch", label="", size=8192, count=2048, dtype="float32", redop="sum", wrong=0
    )
    line |= dict(in_place=False, logical_bytes=None, wire_bytes=None, device="npu", median=90.0, mean=100.0, busbw=0.1)
    lines = [line, dict(line, in_place=True, mean=1.0), dict(line, size=16384, wrong=2)]
    del lines[2]["mean"]
    context = dict(device_name="Ascend910", ranks=2, versions={"torch": "2"})
    text = report.table(lines, context).splitlines()
    at = text.index("# HcclAllReduce")
    assert [" ".join(row.split()) for row in text[at + 1 : at + 4]] == [
        "data_size(Bytes): | aveg_time(us): | alg_bandwidth(GB/s): | check_result:",
        "8192 | 100.00 | 0.08192 | success",
        "16384 | - | - | failed",
    ]
    assert text[at + 5] == "# all_reduce"  # nccl-tests' columns follow, with in-place lines
    assert "Hccl" not in report.table([dict(line, device="cuda")], context)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_under_torchrun_the_ranks_found_are_used(tmp_path: Any, ranks: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = ["-m", "moeweave.launch.bench", "op=[all_to_all,dispatch,raw]", "device=cpu", "iterations=2"]
    done = fresh([*launcher, *program, "max_size=4096", "out=files"], tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    assert done.out.count("# Out of bounds values : 0 OK") == 1
    kept = [json.loads(line) for line in (tmp_path / "files/bench.jsonl").read_text().splitlines()]
    assert {line["ranks"] for line in kept} == {ranks}
    done = fresh([*launcher, *program[:2], "op=nothing"], tmp_path)
    assert done.code != 0
    assert done.err.count("moeweave-bench: error: op=nothing") == 1


def test_a_line_that_was_wrong_has_no_time_in_the_table() -> None:
    line = dict(op="all_reduce", backend="torch", label="", size=64, count=16, dtype="float32", redop="sum", wrong=3)
    line |= dict(in_place=False, logical_bytes=None, wire_bytes=None)
    report.relate([line])
    text = report.table([line], dict(device_name="cpu", ranks=2, versions={"torch": "2"}))
    assert "# Out of bounds values : 3 FAILED" in text


@pytest.mark.parametrize(
    "values, text",
    [
        (dict(op="all_reduce", backend="hccl"), "backend=hccl: it is for NPUs, and the device is cpu"),
        (dict(op="dispatch", backend="ascend"), "backend=ascend: it is for NPUs, and the device is cpu"),
        (dict(op="moe_layer", backend=["alltoall", "ascend_gathered"]), "backend=ascend_gathered: it is for NPUs"),
    ],
)
def test_backends_of_npus_say_so(values, text):
    with pytest.raises(ConfigError, match=text):
        check(BenchConfig(**{**SMALL, **values}), 2)


def test_backends_of_npus_have_no_backward():
    config = BenchConfig(**{**SMALL, "op": "moe_layer_backward", "device": "npu"})
    with pytest.raises(ConfigError, match="backend=ascend: its operators have no gradient"):
        ascend.check("moe_layer_backward", config, ["ascend"])
    ascend.check("moe_layer", config, ["ascend", "alltoall"])
