"""Every call of an NPU operator through torch-npu itself, on meta tensors, over stand-ins for CANN: it takes the
arguments, and returns what its documentation says.

torch-npu lies unpacked beside the environment (`make test` puts it there), never on its path.

Letters: B tokens of the call, D width, A rows at most, e experts of a rank, W ranks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_stub
from extract_npu_schemas import ROOT, called_names
from npu_calls import record

SITE = Path(sys.prefix) / "torch-npu"


def missing() -> str | None:
    """Why torch-npu cannot run here, None if it can."""
    release = ".".join(torch.__version__.split(".")[:2])
    if not list(SITE.glob(f"torch_npu-{release}.*")):
        return f"no torch-npu for torch {release} in {SITE}"
    if not list((SITE / "torch_npu").glob(f"_C.cpython-{sys.version_info.major}{sys.version_info.minor}-*")):
        return f"torch-npu in {SITE} is for another Python"
    return None if shutil.which("gcc") and shutil.which("nm") else "gcc and nm build the stand-ins"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if reason := missing():
        pytest.skip(reason)
    stubs = npu_stub.build(SITE / "torch_npu", tmp_path_factory.mktemp("stubs"))
    script = Path(__file__).with_name("npu_meta_calls.py")
    environment = npu_stub.environment(SITE, stubs, ROOT)
    command = [sys.executable, script]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(answers: dict[str, Any]) -> list[dict[str, Any]]:
    return answers["calls"]


def documented(name: str, given: dict[str, Any]) -> list[list[Any]]:
    """Shapes and dtypes of an operator's results, by its documentation."""
    if name == "npu_moe_distribute_dispatch_v2":
        dim, top_k = given["x"].shape[1], given["expert_ids"].shape[1]
        world = given["ep_world_size"]
        local = given["moe_expert_num"] // world
        rows = given["global_bs"] * min(local, top_k)
        quantized = given["quant_mode"] == 2
        # A2 has the weights sent along, and counts of every server of 8 besides those of (expert, rank).
        a2 = given["expert_scales"] is not None
        counts = world * local + (2 * given["global_bs"] * top_k * (world // 8) if a2 else 0)
        return [
            [[rows, dim], "int8" if quantized else "bfloat16"],
            [[rows], "float32"],
            [[rows * 128], "int32"],
            [[local], "int64"],
            [[counts], "int32"],
            [[0], "int32"],
            [[rows if a2 else 0], "float32"],
        ]
    if name == "npu_moe_distribute_combine_v2":
        return [[[given["expert_ids"].shape[0], given["expand_x"].shape[1]], "bfloat16"]]
    if name == "npu_dynamic_quant":
        return [[list(given["input"].shape), "int8"], [list(given["input"].shape[:-1]), "float32"]]
    if name == "npu_dequant_swiglu_quant":
        return [[[given["x"].shape[0], given["x"].shape[1] // 2], "int8"], [list(given["x"].shape[:1]), "float32"]]
    if name == "npu_moe_init_routing_v2":
        rows, (first, end) = given["expert_idx"].numel(), given["active_expert_range"]
        expanded = [[rows, given["x"].shape[1]], str(given["x"].dtype)[6:]]
        return [expanded, [[rows], "int32"], [[end - first], "int64"], [[rows], "float32"]]
    if name == "npu_moe_token_unpermute":
        return [[[given["probs"].shape[0], given["permuted_tokens"].shape[1]], "bfloat16"]]
    if name == "npu_moe_gating_top_k":
        chosen = [given["x"].shape[0], given["k"]]
        return [[chosen, "float32"], [chosen, "int32"], [list(given["x"].shape), "float32"]]
    (left,), (right,) = given["x"], given["weight"]
    if left.dtype == torch.int8:
        written = "bfloat16" if given["scale"][0].dtype == torch.bfloat16 else "float16"
        return [[[left.shape[0], right.shape[-1]], written]]
    if given["group_type"] == 0:
        return [[[left.shape[0], right.shape[-1]], "bfloat16"]]
    return [[[len(given["group_list"]), left.shape[0], right.shape[-1]], "bfloat16"]]


def test_every_call_returns_the_documented_shapes(found: list[dict[str, Any]]) -> None:
    recorded = record()
    assert {name for name, _ in recorded} == called_names()
    for (name, given), each in zip(recorded, found, strict=True):
        assert each["name"] == name
        assert each["shapes"] == documented(name, given), name


def test_a_keyword_that_does_not_exist_is_refused(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "no_such_keyword" in each["refusal"], each["name"]


def test_options_of_a_group_take_the_planes_config(answers: dict[str, Any]) -> None:
    assert answers["hccl_config"] == {"hccl_op_expansion_mode": 3}
