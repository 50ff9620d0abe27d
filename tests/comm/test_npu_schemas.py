"""Every call of an NPU operator against the schemas of the two newest torch-npu releases: names, kinds and types of the
arguments, and the number of results. Regenerate npu_schemas.json by extract_npu_schemas.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from extract_npu_schemas import DATA, called_names
from npu_calls import record

SCHEMAS: dict[str, dict[str, list[str]]] = json.loads(DATA.read_text(encoding="utf-8"))
RELEASES = sorted(SCHEMAS)
Calls = list[tuple[str, dict[str, Any]]]

# What the library reads of each operator's results; a single Tensor and a Tensor[] are one.
RESULTS = {
    "npu_moe_distribute_dispatch_v2": ["Tensor"] * 7,
    "npu_moe_distribute_combine_v2": ["Tensor"],
    "npu_grouped_matmul": ["List[Tensor]"],
    "npu_dynamic_quant": ["Tensor"] * 2,
    "npu_dequant_swiglu_quant": ["Tensor"] * 2,
    "npu_moe_init_routing_v2": ["Tensor"] * 4,
    "npu_moe_token_unpermute": ["Tensor"],
    "npu_moe_gating_top_k": ["Tensor"] * 3,
}


@pytest.fixture(scope="module")
def recorded() -> Calls:
    return record()


def fits(value: Any, kind: str) -> bool:
    """Whether an argument is of the schema's type, as `str(argument.type)` spells it."""
    if kind.startswith("Optional["):
        return value is None or fits(value, kind[9:-1])
    if kind.startswith("List["):
        return isinstance(value, list) and all(fits(each, kind[5:-1]) for each in value)
    checks: dict[str, Callable[[Any], bool]] = {
        "Tensor": lambda value: isinstance(value, Tensor),
        "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
        "str": lambda value: isinstance(value, str),
        "bool": lambda value: isinstance(value, bool),
        "float": lambda value: isinstance(value, float),
    }
    return checks[kind](value)


def faults(name: str, arguments: dict[str, Any], schema_text: str) -> list[str]:
    """What the schema does not allow in a call of `name`, and what it returns that the library does not expect."""
    schema = torch._C.parse_schema(f"npu::{schema_text}")
    known = {argument.name: argument for argument in schema.arguments}
    found = [f"{name} has no argument {key}" for key in arguments if key not in known]
    for key, argument in known.items():
        if key in arguments:
            if not fits(arguments[key], str(argument.type)):
                found.append(f"{name}.{key} is {argument.type}, not {type(arguments[key]).__name__}")
        elif not argument.has_default_value():
            found.append(f"{name} needs {key}")
    returned = [str(result.type) for result in schema.returns]
    if returned != RESULTS[name]:
        found.append(f"{name} returns {returned}, not {RESULTS[name]}")
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_fits_the_schema(recorded: Calls, release: str) -> None:
    for name, arguments in recorded:
        overloads = [faults(name, arguments, text) for text in SCHEMAS[release][name]]
        assert [] in overloads, f"torch-npu {release}: {min(overloads, key=len)}"


def test_every_operator_is_recorded_and_held(recorded: Calls) -> None:
    names = called_names()
    assert {name for name, _ in recorded} == names == set(RESULTS)
    assert len(RELEASES) == 2
    for release in RELEASES:
        assert set(SCHEMAS[release]) == names
        assert all(SCHEMAS[release].values())


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("Tensor expert_ids", "Tensor ids", "has no argument expert_ids"),
        ("int quant_mode=0", 'str quant_mode=""', "quant_mode is str, not int"),
        ("int moe_expert_num,", "int moe_expert_num, int more,", "needs more"),
        ("Tensor, Tensor)", "Tensor)", "returns"),
    ],
)
def test_a_changed_schema_is_named(recorded: Calls, old: str, new: str, text: str) -> None:
    name, arguments = recorded[0]
    schema = SCHEMAS[RELEASES[-1]][name][0]
    assert old in schema
    assert any(text in fault for fault in faults(name, arguments, schema.replace(old, new)))
