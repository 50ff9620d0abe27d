"""`python -m moeweave.launch.place`: from the load that a run logged to a placement that the run goes on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moeweave.launch.place import logged_load, main
from programs import run
from test_train import TINY, losses


def lines_of(folder: Path, loads: list[Any]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "load": load}) for step, load in enumerate(loads)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_last_loads_are_summed_and_the_fullest_rank_gets_less(tmp_path, capsys):
    folder = lines_of(tmp_path / "run", [{"a": [9, 9, 9, 9]}, {"a": [60, 20, 5, 3]}, None, {"a": [30, 10, 5, 7]}])
    assert logged_load(folder, 2) == {"a": [90, 30, 10, 10]}
    assert main([str(folder), "--ep", "2", "--last", "2", "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": [0, 3, 1, 2]}
    shown = capsys.readouterr().out
    assert "1.714" in shown and "1.429" in shown  # 120 and 100 of 70
    assert main([str(folder), "--ep", "2", "--slots", "6", "--last", "2", "--out", str(tmp_path / "out.json")]) == 0
    assert sorted(json.loads((tmp_path / "out.json").read_text())["a"]) == [0, 0, 0, 1, 2, 3]


def test_what_cannot_be_placed_is_refused(tmp_path, capsys):
    out = str(tmp_path / "out.json")
    assert main([str(tmp_path), "--ep", "2", "--out", out]) == 2
    assert "has no load of experts in metrics.jsonl. Name the folder of a training run." in capsys.readouterr().err
    folder = lines_of(tmp_path / "run", [{"a": [9, 9, 9, 9]}])
    assert main([str(folder), "--ep", "2", "--out", str(tmp_path / "nowhere/out.json")]) == 2
    assert "out.json: No such file or directory" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--ep", "0", "--out", out])
    assert "--ep: 0: must be a whole number of at least 1" in capsys.readouterr().err
    assert main([str(folder), "--ep", "3", "--out", out]) == 2
    assert "a: num_slots (4) must be a multiple of num_ranks (3)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--slots", "12"]], ids=["placed", "replicas"])
def test_a_run_goes_on_with_its_experts_placed_by_its_load(more, tmp_path):
    short = [*TINY, "log.load_every=1", "checkpoint.every=2"]
    done = run("train", *short, "steps=4", "proof=false", "run.dir=plain", cwd=tmp_path)
    assert done.code == 0, done.err
    shutil.copytree(tmp_path / "plain", tmp_path / "placed")
    done = run("moeweave.launch.place", "placed", "--ep", "2", *more, "--out", "placement.json", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    slots = json.loads((tmp_path / "placement.json").read_text())
    assert any(each != sorted(each) for each in slots.values())
    assert run("train", *short, "steps=8", "proof=false", "run.dir=plain", cwd=tmp_path).code == 0
    done = run("train", *short, "steps=8", "run.dir=placed", "plan.placement=placement.json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "proof   passed" in done.out
    assert losses(tmp_path / "placed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    refused = run("train", *short, "steps=9", "run.dir=placed", "plan.placement=none.json", cwd=tmp_path)
    assert refused.code == 2 and "Plan.placement (none.json) must map paths" in refused.err
