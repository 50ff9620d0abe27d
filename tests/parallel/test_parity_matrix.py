"""Every combination of axes trains the same model: a row of the matrix with one model, and the table as it is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from parity_matrix import AXES, GRADIENT, MODELS, NORM, ROWS, compare, markdown, name_of, pairs, ranks_of, sizes_of
from run_ranks import run_ranks
from test_pipeline import V_ON_GLOO

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/results/parity_matrix.json"
# All rows of four ranks and these of eight run by default, each with one of the models; the rest takes minutes.
EIGHT = [
    "dp8 ep4 etp2",
    "dp4 tp2 ep4",
    "pp2 dp4 ep2 etp2",
    "pp2 dp2 tp2 etp2",
    "pp2 dp2 tp2 ep2 etp2, zero_bubble",
    "dp2 tp2 sp2 ep4, ulysses, tp_sequence",
    "pp2 dp2 sp2 ep2, ring",
]


def cases() -> list[Any]:
    found = []
    for at, row in enumerate(ROWS):
        for which, model in enumerate(MODELS):
            quick = which == at % len(MODELS) and (ranks_of(row) == 4 or name_of(row) in EIGHT)
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(model, row, id=f"{name_of(row)}, {model}", marks=marks))
    return found


@pytest.mark.parametrize(("model", "row"), cases())
def test_gradients_update_and_norm_are_those_of_one_process(model: str, row: dict[str, Any]) -> None:
    if row.get("schedule") == "dualpipev" and not V_ON_GLOO:
        pytest.skip("torch 2.11 opens dualpipev by a message from a rank to itself, which gloo cannot send")
    for found in run_ranks(ranks_of(row), compare, model, row):
        assert found["gradient"] <= GRADIENT, (found["worst_name"], found["gradient"])
        assert found["loss_error"] <= GRADIENT
        assert found["update"] <= GRADIENT
        assert found["norm"] <= NORM


def test_every_pair_of_axes_is_compared() -> None:
    quick = [case for case in cases() if not case.marks]
    assert len(quick) >= 24
    assert pairs() == set(itertools.combinations(AXES, 2))
    five = dict.fromkeys(("dp", "tp", "pp", "ep", "sp"), 2)
    assert any(all(row.get(axis, 1) == size for axis, size in five.items()) for row in ROWS)
    assert any(all(row.get(axis, 1) > 1 for axis in AXES) for row in ROWS)
    assert {name_of(row) for row in ROWS if ranks_of(row) == 8} >= set(EIGHT)


def test_tokens_cross_nodes_on_every_axis() -> None:
    meshes = [sizes_of(row) for row in ROWS if row.get("dispatcher") == "hierarchical" and row["nodes"] > 1]
    axes = [[axis for axis, size in sizes.items() if size > 1] for sizes in meshes]
    assert set().union(*axes) == {*AXES, "dp_replicate"}
    assert all("ep" in own for own in axes) and any(len(own) >= 4 for own in axes)


def test_the_table_is_of_these_rows_and_in_the_readme() -> None:
    table = json.loads(TABLE.read_text())["rows"]
    assert [(found["row"], found["model"]) for found in table] == list(itertools.product(ROWS, MODELS))
    for found in table:
        assert found["ok"]
        assert max(found["gradient"], found["update"]) <= GRADIENT
        assert found["norm"] <= NORM
        assert found["gradients"] > 20
    assert markdown(table) in (ROOT / "README.md").read_text()
