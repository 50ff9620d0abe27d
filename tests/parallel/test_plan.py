"""The one policy object: what it accepts, and what it says to what it does not."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest
import torch

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.ascend_limits import AscendOptions
from moeweave.parallel.plan import Plan

LEGAL = dict(
    data=["fsdp2", "ddp"],
    dispatcher=["auto", "alltoall", "allgather", "onesided"],
    combine=[None, "exact"],
    ascend=[AscendOptions(), AscendOptions("A2", 64), AscendOptions(max_tokens=4096, path="gathered")],
    codec=[Codec(), Codec(dispatch="fp8"), Codec(combine="int8", dispatch_backward="fp8_e5m2")],
    aux=["global", "rank"],
    capacity=[None, 0.5, 1.25, 2],
    drop=["probability", "position"],
    dtype=[None, "float32", "bfloat16"],
    recompute=[False, True],
    overlap=[None, "microbatch", "three_stream"],
    microbatches=[2, 5],
    overlap_min_tokens=[0, 4096],
    three_stream_form=["auto", "gathered", "routed"],
    push_share=[0.0, 1.0, None],
    planes=["auto", "windows", "collectives"],
    push_sms=[0, 16],
    grad_sync=["last", "each"],
)


def test_every_legal_value_is_accepted_and_kept() -> None:
    assert set(LEGAL) <= {field.name for field in dataclasses.fields(Plan)}
    for field, values in LEGAL.items():
        for value in values:
            assert getattr(Plan.from_dict({field: value}), field) == value
    assert Plan.from_dict({}) == Plan()
    assert Plan.from_dict(dataclasses.asdict(Plan(aux="rank"))) == Plan(aux="rank")


@pytest.mark.parametrize(
    "key, near", [("dispatch", "dispatcher"), ("recompte", "recompute"), ("capacty", "capacity"), ("Dtype", "dtype")]
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Plan has no field {key!r}. Did you mean {near!r}?")):
        Plan.from_dict({key: 1})
    with pytest.raises(TypeError, match=re.escape(f"Plan has no field {key!r}. Did you mean {near!r}?")):
        Plan(**{key: 1})


def test_a_plan_is_copied_and_pickled_like_any_value() -> None:
    plan = Plan(aux="rank", capacity=1.5)
    assert copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan)) == plan
    assert dataclasses.replace(plan, capacity=None) == Plan(aux="rank")


def test_a_codec_is_written_short_or_by_its_fields() -> None:
    for written in ("fp8", dict(dispatch="fp8"), Codec(dispatch="fp8")):
        plan = Plan(codec=written)
        assert plan.codec == Codec(dispatch="fp8")
        assert Plan.from_dict(dataclasses.asdict(plan)) == plan
        assert hash(plan) == hash(Plan(codec="fp8"))
    assert Plan().codec == Plan(codec=None).codec == Codec()


def test_a_key_like_no_other_is_refused_with_all_of_them() -> None:
    with pytest.raises(ValueError, match=r"Plan has no field 'zzz'\. It has: data, dispatcher, topology, combine"):
        Plan.from_dict({"zzz": 1})


@pytest.mark.parametrize(
    "values, text",
    [
        (dict(data="fsdp"), "Plan.data ('fsdp') must be one of 'fsdp2', 'ddp', 'zero0'"),
        (dict(aux="local"), "Plan.aux ('local') must be one of 'global', 'rank'."),
        (dict(dtype="bf16"), "Plan.dtype ('bf16') must be one of None, 'float32', 'bfloat16'."),
        (dict(dtype=torch.bfloat16), "Plan.dtype (torch.bfloat16) must be one of"),
        (dict(drop="last"), "Plan.drop ('last') must be one of 'probability', 'position'."),
        (dict(capacity=0), "Plan.capacity (0) must be positive"),
        (dict(capacity=-1.5), "Plan.capacity (-1.5) must be positive"),
        (dict(capacity="all"), "Plan.capacity ('all') must be positive"),
        (dict(capacity=float("nan")), "Plan.capacity (nan) must be positive"),
        (dict(recompute="yes"), "Plan.recompute ('yes') must be one of False, True."),
        (
            dict(dispatcher="deepep"),
            "dispatcher ('deepep') must be one of alltoall, allgather, onesided, hierarchical, ascend, auto.",
        ),
        (dict(dispatcher="alltoall", combine="prereduced"), "combine ('prereduced') must be one of exact"),
        (dict(codec="fp9"), "codec ('fp9') must be one of none, fp8, fp8_e5m2, int8. Did you mean 'fp8'?"),
        (dict(codec=dict(dispach="fp8")), "codec's field ('dispach') must be one of dispatch"),
        (dict(codec="fp8", dispatcher="ascend"), "codec (fp8) must be 'none' or 'int8' for dispatcher='ascend'"),
        (dict(data="ddp", dtype="bfloat16"), "Plan.dtype ('bfloat16') needs data='fsdp2'"),
        (dict(overlap="yes"), "Plan.overlap ('yes') must be one of None, 'microbatch', 'three_stream'."),
        (dict(microbatches=1), "Plan.microbatches (1) must be a whole number of at least 2."),
        (dict(overlap_min_tokens=-1), "Plan.overlap_min_tokens (-1) must be a whole number of at least 0."),
        (dict(grad_sync="all"), "Plan.grad_sync ('all') must be one of 'last', 'each'."),
        (dict(overlap="three_stream", push_share=2.0), "push_share (2.0) must be from 0 to 1."),
        (
            dict(overlap="three_stream", max_tokens=8),
            "max_tokens (8) must be at least 1 and go with combine='prereduced'",
        ),
        (dict(data=["ddp"]), "Plan.data (['ddp']) must be one of"),
    ],
)
def test_a_value_outside_the_choices_is_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Plan.from_dict(values)


def test_a_plan_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().data = "ddp"  # type: ignore[misc]
    assert hash(Plan()) == hash(Plan())
    assert Plan().torch_dtype is None
    assert Plan(dtype="bfloat16").torch_dtype is torch.bfloat16


def test_options_of_ascend_are_written_by_their_fields() -> None:
    plan = Plan(ascend=dict(series="A2", max_tokens=64))
    assert plan.ascend == AscendOptions("A2", 64)
    assert Plan.from_dict(dataclasses.asdict(plan)) == plan
    with pytest.raises(ValueError, match=r"ascend\.tokens is unknown\. Use one of series, max_tokens, path"):
        Plan(ascend=dict(tokens=3))
    with pytest.raises(ValueError, match=r"path \('mc2'\) must be one of operators, gathered"):
        Plan(ascend=dict(path="mc2"))
