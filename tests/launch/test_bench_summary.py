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
