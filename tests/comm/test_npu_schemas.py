"""Every call of an NPU operator against the schemas of the two newest torch-npu releases: names, kinds and types of the
arguments, and the number of results. Regenerate npu_schemas.json by extract_npu_schemas.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from extract_npu_schemas import DATA, called_names
from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.ascend import AscendDispatcher
from moeweave.comm.dispatchers.ascend_limits import AscendOptions
from moeweave.kernels_ext import npu
from moeweave.kernels_ext.grouped_mm import npu_impl as grouped_mm_npu
from moeweave.kernels_ext.quantize_rows import npu_impl as quantize_npu

SCHEMAS: dict[str, dict[str, list[str]]] = json.loads(DATA.read_text(encoding="utf-8"))
RELEASES = sorted(SCHEMAS)

# What the library reads of each operator's results; a single Tensor and a Tensor[] are one.
RESULTS = {
    "npu_moe_distribute_dispatch_v2": ["Tensor"] * 7,
    "npu_moe_distribute_combine_v2": ["Tensor"],
    "npu_grouped_matmul": ["List[Tensor]"],
    "npu_dynamic_quant": ["Tensor"] * 2,
}


class FakeGroup:
    """As much of a group of two ranks as the dispatcher reads."""

    group_name = "two"


def x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def run_dispatcher(call: npu.Call, series: str, quantize: bool) -> None:
    given = dict(group_name="two", call=call, codec=Codec.parse("int8" if quantize else "none"))
    dispatcher = AscendDispatcher(FakeGroup(), 4, AscendOptions(series, 4), **given)  # type: ignore[arg-type]
    ids, weights = torch.tensor([[0, 3], [1, 2]]), x(2, 2, dtype=torch.float32)
    dispatched = dispatcher.dispatch(x(2, 1024), ids, weights)
    dispatcher.combine(x(16, 1024), weights, dispatched)
    if series == "A3":
        dispatcher.combine(x(16, 1024), weights, dispatched, shared_TD=x(2, 1024))


class Recorder:
    """A `Call` that keeps name and arguments, and returns tensors of the documented shapes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, **arguments: Any) -> Any:
        self.calls.append((name, arguments))
        counts = torch.zeros(2, dtype=torch.int64)
        return {
            "npu_moe_distribute_dispatch_v2": (x(16, 1024), x(16), x(16 * 128), counts, x(4), x(0), x(16)),
            "npu_moe_distribute_combine_v2": x(4, 1024),
            "npu_grouped_matmul": [x(2, 16, 8)],
            "npu_dynamic_quant": (x(4, 16), x(4)),
        }[name]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(npu, "call", recorder)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    for series in ("A2", "A3"):
        for quantize in (False, True):
            run_dispatcher(recorder, series, quantize)
    offsets = torch.tensor([1, 4], dtype=torch.int32)
    grouped_mm_npu.forward(x(4, 16), x(2, 16, 8), offsets)
    grouped_mm_npu.weight_grad(x(4, 16), x(4, 8), offsets)
    quantize_npu.encode(x(4, 16), "int8")
    return recorder


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
def test_every_call_fits_the_schema(recorded: Recorder, release: str) -> None:
    for name, arguments in recorded.calls:
        overloads = [faults(name, arguments, text) for text in SCHEMAS[release][name]]
        assert [] in overloads, f"torch-npu {release}: {min(overloads, key=len)}"


def test_every_operator_is_recorded_and_held(recorded: Recorder) -> None:
    names = called_names()
    assert {name for name, _ in recorded.calls} == names == set(RESULTS)
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
def test_a_changed_schema_is_named(recorded: Recorder, old: str, new: str, text: str) -> None:
    name, arguments = recorded.calls[0]
    schema = SCHEMAS[RELEASES[-1]][name][0]
    assert old in schema
    assert any(text in fault for fault in faults(name, arguments, schema.replace(old, new)))
