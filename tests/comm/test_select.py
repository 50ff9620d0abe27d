"""The choice of a dispatcher: by name, by `auto`, and what is refused."""

from __future__ import annotations

import logging

import pytest

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers import select
from moeweave.comm.dispatchers.allgather import AllGatherDispatcher
from moeweave.comm.dispatchers.alltoall import AllToAllDispatcher
from moeweave.comm.dispatchers.select import choose, make_dispatcher, validate_choice


def test_by_name() -> None:
    assert isinstance(make_dispatcher("alltoall", None, 8), AllToAllDispatcher)
    exact, prereduced = (
        make_dispatcher("allgather", None, 8),
        make_dispatcher("allgather", None, 8, combine="prereduced"),
    )
    assert isinstance(exact, AllGatherDispatcher)
    assert isinstance(prereduced, AllGatherDispatcher)
    assert (exact.prereduced, prereduced.prereduced) == (False, True)


@pytest.mark.parametrize("top_k, combine", [(2, None), (2, "exact"), (2, "prereduced")])
def test_auto_passes_the_codec_on(top_k: int, combine: str | None) -> None:
    codec = Codec(dispatch="fp8", combine="int8")
    dispatcher = make_dispatcher("auto", None, 8, top_k=top_k, combine=combine, codec=codec, coded_rows=True)
    assert isinstance(dispatcher, AllGatherDispatcher if combine == "prereduced" else AllToAllDispatcher)
    assert (dispatcher.codec, dispatcher.coded_rows) == (codec, True)


@pytest.mark.parametrize("combine", [None, "exact", "prereduced"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("ep_size", [1, 2, 4, 64])
def test_auto_chooses_one_that_can_do_what_is_asked(ep_size: int, top_k: int, combine: str | None) -> None:
    name, reason = choose(ep_size, top_k, combine)
    validate_choice(name, combine)
    assert reason
    assert choose(ep_size, top_k, combine) == (name, reason)
    if ep_size > top_k and combine != "prereduced":
        assert name == "alltoall", "few of many ranks are needed"


def test_auto_says_what_it_chose_once(caplog: pytest.LogCaptureFixture) -> None:
    select._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moeweave"):
        make_dispatcher("auto", None, 8, top_k=2)
        make_dispatcher("auto", None, 8, top_k=2)
    assert [record.getMessage() for record in caplog.records] == [
        "dispatcher auto -> alltoall: one rank: a local permute"
    ]


@pytest.mark.parametrize(
    "name, combine, text",
    [
        ("all2all", None, r"must be one of alltoall, allgather, onesided, hierarchical, ascend, auto"),
        ("alltoall", "prereduced", r"combine \('prereduced'\) must be one of exact with dispatcher='alltoall'"),
        ("allgather", "sum", r"combine \('sum'\) must be one of exact, prereduced"),
        ("ascend", "prereduced", r"combine \('prereduced'\) must be one of exact with dispatcher='ascend'"),
        ("ascend", None, r"backend \(none, one rank\) must be hccl .* Use Mesh\(device='npu'\)"),
        ("auto", "sum", r"combine \('sum'\) must be one of exact, prereduced with dispatcher='auto'"),
    ],
)
def test_what_does_not_exist_is_refused(name: str, combine: str | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_dispatcher(name, None, 8, combine=combine)


class GroupOfThree:
    def size(self) -> int:
        return 3


@pytest.mark.parametrize("name", ["alltoall", "allgather", "auto"])
def test_experts_must_divide_over_the_group(name: str) -> None:
    text = r"num_experts \(8\) must be divisible by the expert group's size \(3\). Legal sizes: 1, 2, 4, 8"
    with pytest.raises(ValueError, match=text):
        make_dispatcher(name, GroupOfThree(), 8)  # type: ignore[arg-type]
