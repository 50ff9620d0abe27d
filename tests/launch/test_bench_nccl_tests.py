"""Our times beside those of nccl-tests: its table is read as it is printed, and what does not agree is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moeweave.launch.bench import nccl_tests
from programs import run

# What a binary of version 2.18 prints, all_gather's sizes for one; `-S`, `-I` and the like add columns.
TABLE = """\
# nccl-tests version 2.18.0 nccl-headers=22809 nccl-library=22809
# Collective test starting: alltoall_perf
# nThread 1 nGpus 2 minBytes 1048576 maxBytes 4194304 step: 4(factor) warmup iters: 1 iters: 20 agg iters: 1
#
# Using devices
#  Rank  0 Group  0 Pid  81234 on   somewhere device  0 [0000:18:00] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place          
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong 
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)         
     1048576        131072     float    none      -1    21.40   49.00   24.50       0    20.97   50.00   25.00     N/A
     4194304        524288     float    none      -1  10240.1    0.41    0.20       2    40960   102.4    51.2     N/A
# Out of bounds values : 1 FAILED
# Avg bus bandwidth    : 25.1750 
#
"""  # noqa: W291
BINARY = """\
#!{python}
import sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["-g"] == "2" and given["-d"] == "bfloat16" and given["-n"] == "3", given
half = "time   algbw   busbw  #wrong"
print("#       size         count      type   redop    root    ", half, "   ", half)
size = int(given["-b"])
while size <= int(given["-e"]):
    print(f"{{size:>12}} {{size // 2:>12}} bfloat16 none -1 12.50 1.00 1.00 0 25.00 2.00 2.00 N/A")
    size *= int(given["-f"])
"""


def test_a_printed_table_is_read() -> None:
    rows = nccl_tests.parse(TABLE)
    assert [(row.size, row.in_place, row.time, row.busbw, row.wrong) for row in rows] == [
        (1 << 20, False, 21.40, 24.50, 0),
        (1 << 20, True, 20.97, 25.00, None),
        (1 << 22, False, 10240.1, 0.20, 2),
        (1 << 22, True, 40960.0, 51.2, None),
    ]
    assert [row.count for row in rows] == [131072, 131072, 524288, 524288]
    assert nccl_tests.parse("# nothing\n1 2 3\n") == []


def test_columns_are_found_by_name_where_there_are_more() -> None:
    names = "time algbw busbw #wrong i_min i_max i_p99 i_cv%"
    cells = "10.0 1.0 0.5 0 9 11 11 3 20.0 2.0 1.5 1 9 11 11 3"
    rows = nccl_tests.parse(f"# size count type redop root {names} {names}\n 64 16 float sum -1 {cells}\n")
    assert [(row.time, row.busbw, row.wrong) for row in rows] == [(10.0, 0.5, 0), (20.0, 1.5, 1)]


def line(op: str, size: int, time: float | None, busbw: float, in_place: bool = False) -> dict[str, Any]:
    timed = {} if time is None else {"median": time, "busbw": busbw}
    return dict(op=op, size=size, count=1, dtype="float32", in_place=in_place, wrong=int(time is None), **timed)


def other(size: int, time: float, busbw: float, in_place: bool = False, wrong: int = 0) -> nccl_tests.Theirs:
    return nccl_tests.Theirs(size, 1, in_place, time, busbw, wrong)


@pytest.mark.parametrize(
    "ours, theirs, off",
    [
        (line("all_to_all", 4096, 104.0, 9.6), other(4096, 100.0, 10.0), False),
        (line("all_to_all", 4096, 106.0, 9.6), other(4096, 100.0, 10.0), True),
        (line("all_to_all", 4096, 94.0, 10.4), other(4096, 100.0, 10.0), True),
        (line("all_to_all", 4096, 100.0, 20.0), other(4096, 100.0, 10.0), True),  # another factor
        (line("all_to_all", 4096, 100.0, 0.014), other(4096, 100.0, 0.01), False),  # what 0.01 may stand for
        (line("all_to_all", 2048, 150.0, 1.0), other(2048, 100.0, 1.5), False),  # below what counts
        (line("all_to_all", 2048, 100.0, 1.5), other(2048, 100.0, 1.5, wrong=1), True),
        (line("all_to_all", 4096, None, 0.0), other(4096, 100.0, 1.5), True),
        (line("all_to_all", 4096, 100.0, 1.5), other(4096, 100.0, 1.5, in_place=True), True),  # no such row
    ],
)
def test_what_differs_is_told(ours: dict[str, Any], theirs: nccl_tests.Theirs, off: bool) -> None:
    options = nccl_tests.Options(Path(), tolerance=0.05, above=4096)
    rows = nccl_tests.beside([ours], {"all_to_all": [theirs]}, options)
    assert [row["off"] for row in rows] == [off]
    assert ("OFF" in nccl_tests.table(rows, options)) == off


def test_all_reduce_is_compared_in_place_alone() -> None:
    lines = [line("all_reduce", 64, 1.0, 1.0, in_place) for in_place in (False, True)]
    theirs = {"all_reduce": [other(64, 2.0, 1.0), other(64, 1.0, 1.0, in_place=True)]}
    rows = nccl_tests.beside(lines, theirs, nccl_tests.Options(Path(), above=64))
    assert [(row["in_place"], row["time_ratio"]) for row in rows] == [(True, 1.0)]


def folder_with(tmp_path: Path, *names: str, text: str = BINARY) -> Path:
    for name in names:
        path = tmp_path / name
        path.write_text(text.format(python=sys.executable))
        path.chmod(0o755)
    return tmp_path


def test_ours_run_at_the_same_sizes_in_the_same_call(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "all_reduce_perf", "alltoall_perf")
    sizes = ["min_size=4096", "max_size=16384", "iterations=3", "warmup=1", "dtype=bfloat16", "above=8192"]
    arguments = [str(folder), "device=cpu", *sizes, "tolerance=1e9", "out=files"]
    done = run("moeweave.launch.bench.nccl_tests", *arguments, cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    assert "iterations back to back" in done.out
    assert "# 2 from 8192 bytes on, 0 differ" in done.out
    found = json.loads((tmp_path / "files/nccl_tests.json").read_text())
    assert [(row["op"], row["size"], row["in_place"], row["nccl_tests"]["time"]) for row in found["rows"]] == [
        ("all_reduce", 4096, True, 25.0),
        ("all_reduce", 16384, True, 25.0),
        ("all_to_all", 4096, False, 12.5),
        ("all_to_all", 16384, False, 12.5),
    ]
    for row in found["rows"]:
        assert row["time_ratio"] == row["moeweave"]["time"] / row["nccl_tests"]["time"]
        assert row["moeweave"]["wrong"] == 0
    kept = [json.loads(text) for text in (tmp_path / "files/bench.jsonl").read_text().splitlines()]
    assert all(each["average"] and not each["flush"] and len(each["times"]) == 5 for each in kept)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "FOLDER: 0 were given"),
        (["{}", "op=broadcast"], "has no binary for it. Use all_reduce"),
        (["{}/none"], "--help says how to build them"),
        (["{}", "min_size=1000"], "must be a multiple of 32, or nccl-tests cut it. Set 1024."),
        (["{}", "average=false"], "average=true alone"),
        (["{}", "above=1e9"], "must be numbers"),
        (["{}", "above=100000000"], "no size is as large"),
        (["{}", "ranks=1"], "must be at least 2"),
    ],
)
def test_what_cannot_run_is_one_line(tmp_path: Path, capsys: Any, arguments: list[str], text: str) -> None:
    folder = folder_with(tmp_path, "all_reduce_perf")
    assert nccl_tests.main([*(argument.format(folder) for argument in arguments), "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_binary_that_fails_is_told_by_its_last_line(tmp_path: Path, capsys: Any) -> None:
    failing = "#!{python}\nimport sys\nsys.exit('no CUDA-capable device is detected')\n"
    folder = folder_with(tmp_path, "sendrecv_perf", text=failing)
    assert nccl_tests.main([str(folder), "device=cpu"]) == 1
    assert "sendrecv_perf ended with 1: no CUDA-capable device is detected" in capsys.readouterr().err
