"""The short table of a machine's figures comes from the lines that were measured, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeweave.launch.bench import summary

CONTEXT = dict(device_name="a device", ranks=2, versions=dict(torch="2.13"), git=None, config={})


def line(op: str, backend: str, median: float, label: str = "v3-decode32") -> dict[str, Any]:
    return dict(op=op, backend=backend, label=label, median=median, graph=True, times=[median], context=CONTEXT)


LINES = [
    line("peak", "push", 4.0, "raw"),
    line("dispatch", "alltoall", 90.0),
    line("dispatch", "onesided_static", 8.0),
    line("combine", "alltoall", 60.0),
    line("combine", "onesided_static", 6.0),
    line("peak", "push", 5.0, "raw"),
    line("dispatch", "onesided_static fp8", 7.0),
]


def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "bench.jsonl"
    given.write_text("".join(json.dumps(each) + "\n" for each in LINES))
    assert summary.main([str(given), "--out", str(tmp_path / "short"), "--sha", "abc"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[2:] == [
        "| v3-decode32, graph | dispatch | 90 | 8.0 | 11.2 | 4.0 | 2.00 | 7.0 |",
        "| v3-decode32, graph | combine | 60 | 6.0 | 10.0 | 4.0 | 1.50 |  |",
    ]
    kept = json.loads((tmp_path / "short.json").read_text())
    assert (kept["device_name"], kept["git"], len(kept["lines"])) == ("a device", {"sha": "abc"}, len(LINES))
    assert not {"times", "context"} & kept["lines"][0].keys()
    assert (tmp_path / "short.png").read_bytes().startswith(b"\x89PNG")


def test_lines_without_the_two_backends_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "bench.jsonl"
    given.write_text(json.dumps(LINES[0]) + "\n")
    for path in (given, tmp_path / "missing.jsonl"):
        assert summary.main([str(path), "--out", str(tmp_path / "short")]) == 2
        assert f"{path} has no dispatch by onesided_static and alltoall" in capsys.readouterr().err


def raw(backend: str, label: str, median: float, **more: Any) -> dict[str, Any]:
    return line("raw", backend, median, label) | dict(size=2_500_000, min=median - 1, busbw=2500 / median) | more


RAW_LINES = [
    raw("torch", "v3-prefill", 100.0),
    raw("push", "v3-prefill", 10.0),
    raw("dma", "v3-prefill", 20.0),
    raw("push", "v3-prefill", 40.0, programs=8, graph=False),
    raw("push", "", 1.0),  # sizes without a shape
    {key: value for key, value in raw("push", "v3-decode32", 1.0).items() if key != "median"},  # it was wrong
]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_raw_bytes_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    given = tmp_path / f"lines.{suffix}"
    lines = "".join(json.dumps(each) + "\n" for each in RAW_LINES)
    given.write_text(json.dumps({"lines": RAW_LINES}) if suffix == "json" else lines)
    assert summary.main([str(given), "--raw"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| v3-prefill, graph | 2.5 | 10.0 (9.0) | 250 | 20.0 (19.0) | 125 | 100.0 (99.0) | 25 |",
        "| v3-prefill, 8 programs | 2.5 | 40.0 (39.0) | 62 |  |  |  |  |",
    ]
    given.write_text(json.dumps({"lines": LINES[:1]}) if suffix == "json" else json.dumps(LINES[0]))
    assert summary.main([str(given), "--raw"]) == 2
    assert "no op=raw with a shape" in capsys.readouterr().err
