"""Every dispatcher of one node on every axis, each way back: gradients against one process; the plans of hierarchical.

The matrix of axes itself, with hierarchical on each of them, is in test_parity_matrix.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hf_zoo
import moeweave as mw
from faked_nodes import write_nodes
from moeweave.comm.dispatchers.select import COMBINES
from moeweave.parallel.verify import gradient_parity
from parity_matrix import GRADIENT, NORM
from run_ranks import run_ranks

MESHES = [
    dict(dp=4, ep=4),
    dict(dp=2, tp=2, ep=4),
    dict(dp=2, sp=2, ep=4),
    dict(pp=2, dp=2, ep=2),
    dict(dp_replicate=2, dp=2, ep=2),
    dict(dp=4, ep=2, etp=2),
]
WAYS = [(name, way) for name, ways in COMBINES.items() if name not in ("ascend", "hierarchical") for way in ways]
PLANS: list[dict[str, Any]] = [
    dict(data="ddp"),
    dict(recompute=True),
    dict(overlap="microbatch", overlap_min_tokens=0),
    dict(overlap="three_stream", three_stream_form="hierarchical"),
]


def cases() -> list[Any]:
    found = []
    for sizes, (name, combine) in itertools.product(MESHES, WAYS):
        title = " ".join(f"{axis}{size}" for axis, size in sizes.items())
        plan = dict(dispatcher=name, combine=combine)
        found.append(pytest.param(sizes, plan, id=f"{title}-{name}-{combine}", marks=pytest.mark.slow))
    for plan in PLANS:
        name, value = next(iter(plan.items()))
        plan = dict(plan, dispatcher="hierarchical")
        found.append(pytest.param(MESHES[0], plan, id=f"{name}-{value}", marks=pytest.mark.slow))
    return found


def compare(sizes: dict[str, int], plan: dict[str, Any]) -> tuple[float, float, float, str, set[str]]:
    """Worst gradient, norm and loss error, the gradient's name, and who moved the tokens."""
    mesh, models = mw.Mesh(**sizes, device="cpu"), []
    build = partial(hf_zoo.build, "qwen3_moe", num_hidden_layers=2)
    batch = partial(hf_zoo.make_batch, "qwen3_moe", rows=2 * mesh.sizes.pp, length=16)
    # Parts in turns have a balance loss each, on both sides.
    parts = 2 if plan.get("overlap") == "microbatch" else None
    report = gradient_parity(build, batch, mesh, mw.Plan(**plan), prepare=models.append, microbatches=parts)
    kinds = {type(call.dispatcher).__name__ for call in vars(models[1])["_moeweave"].calls}
    return report.worst, report.norm_error, report.loss_error, report.worst_name, kinds


@pytest.mark.parametrize(("sizes", "plan"), cases())
def test_gradients_are_those_of_one_process(sizes: dict[str, int], plan: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if plan["dispatcher"] == "hierarchical":
        plan = dict(plan, topology=write_nodes(tmp_path, (0, 0, 1, 1)))
    for worst, norm, loss, name, kinds in run_ranks(4, compare, sizes, plan):
        assert max(worst, loss) <= GRADIENT and norm <= NORM, (name, worst, norm, loss)
        assert [kind.lower() for kind in kinds] == [f"{plan['dispatcher']}dispatcher"]


def test_every_dispatcher_meets_every_axis() -> None:
    axes = {axis for sizes in MESHES for axis, size in sizes.items() if size > 1}
    assert axes == {"dp", "tp", "sp", "pp", "ep", "etp", "dp_replicate"}
    assert {name for name, _ in WAYS} == {"alltoall", "allgather", "onesided"}
