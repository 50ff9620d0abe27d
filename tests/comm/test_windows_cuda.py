"""The map of CUDA windows and the layout over them: sizes and rules, which need no GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moeweave.comm.dispatchers.onesided_cuda import CudaOptions, OneSidedCudaDispatcher
from moeweave.comm.engines_cuda import Place, apart
from moeweave.comm.layout import Layout
from moeweave.comm.onesided_cuda import CudaMoves
from moeweave.comm.onesided_launch import ceil_div, divisor_below
from moeweave.comm.windows_cuda import WindowMap
from moeweave.kernels_ext import onesided

V3 = WindowMap(size=4, num_experts=256, top_k=8, max_tokens=4096, row_bytes=14336, back_bytes=14336)


def test_size_is_known_before_anything_is_allocated() -> None:
    rows = 2 * 4 * 4096 * 14336  # there and back, from each rank
    assert V3.num_bytes == 471_616_128
    assert rows < V3.num_bytes < rows * 1.01


@pytest.mark.parametrize("exact", [False, True])
def test_parts_follow_each_other_aligned(exact: bool) -> None:
    starts = replace(V3, exact=exact, max_tokens=37, top_k=5).starts
    offsets = list(starts.values())
    assert all(offset % 128 == 0 for offset in offsets)
    assert all(a < b for a, b in itertools.pairwise(offsets))
    assert starts["end"] - starts["combine_rows"] >= 37 * (5 if exact else 4) * 14336


@pytest.mark.parametrize("tokens, chunk, chunks", [(1, 1, 1), (128, 1, 128), (4096, 16, 256), (9000, 32, 282)])
def test_chunks_hold_all_tokens(tokens: int, chunk: int, chunks: int) -> None:
    room = replace(V3, max_tokens=tokens)
    assert (room.chunk, room.num_chunks) == (chunk, chunks)
    assert room.chunk * room.num_chunks >= tokens


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(num_experts=255), r"num_experts \(255\) must be a multiple of the group's size \(4\)"),
        (dict(top_k=17), r"top_k \(17\) must be from 1 to 16"),
        (dict(size=128), r"the group's size \(128\) must be from 1 to 64"),
        (dict(max_tokens=1 << 20), r"max_tokens \* top_k \(8388608\) must be from 1 to 4194304"),
        (dict(num_experts=8192), r"experts of a rank \(2048\) must be from 1 to 1024"),
        (dict(row_bytes=14344), r"row_bytes \(14344\) must be a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(V3, **change)


def test_division_by_magic_is_exact() -> None:
    """The kernels' id / num_local, as `Launcher` prepares it, for every id that a window may have."""
    ids = torch.arange(65536, dtype=torch.int64)
    for local in (2, 3, 7, 64, 100, 257, 1000, 1024):
        assert torch.equal(ids * ceil_div(1 << 32, local) >> 32, ids // local)


@pytest.mark.parametrize("number, most, want", [(16, 5, 4), (12, 5, 4), (12, 100, 12), (12, 0, 1), (16, 16, 16)])
def test_warps_that_share_a_row_divide_the_block(number: int, most: int, want: int) -> None:
    assert divisor_below(number, most) == want


def test_layout_of_windows_knows_sizes_and_no_counts() -> None:
    moves = CudaMoves(torch.zeros(5, 3, dtype=torch.int64), *[torch.zeros(2, dtype=torch.int32)] * 5)
    layout = Layout.of_windows(moves, 40, "engine")
    assert (layout.num_tokens, layout.top_k, layout.num_rows, layout.group) == (5, 3, 40, "engine")
    assert layout.slots is moves


def dispatcher_that_dropped(routes: int, options: CudaOptions) -> OneSidedCudaDispatcher:
    dispatcher = OneSidedCudaDispatcher(None, 4, options=options)  # type: ignore[arg-type]
    dispatcher._engine = SimpleNamespace(launcher=SimpleNamespace(check=lambda: None, num_dropped=routes))
    return dispatcher


def test_rows_without_room_are_an_error_unless_dropping_was_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"capacity \(8\) must hold all rows that come: 3 found no room"):
        dispatcher_that_dropped(3, CudaOptions(capacity=8)).check()
    dispatcher_that_dropped(0, CudaOptions(capacity=8)).check()
    dropping = dispatcher_that_dropped(3, CudaOptions(capacity=8, drop=True))
    dropping.check()
    assert dropping.num_dropped == 3


def test_a_combine_before_any_dispatch_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="dispatch must come first"):
        OneSidedCudaDispatcher(None, 4).check()  # type: ignore[arg-type]


def test_a_device_without_the_kernels_is_told_why() -> None:
    assert onesided.supports(torch.device("cpu")) == "needs an NVIDIA GPU, not cpu"


HERE = Place(None, "a", 0, (True, True))
THERE = Place(None, "a", 1, (True, True))


@pytest.mark.parametrize(
    "places, reason",
    [
        ([HERE, THERE], None),
        ([HERE, THERE._replace(reason="needs compute capability 9.0")], "rank 1 needs compute capability"),
        ([HERE, THERE._replace(host="b")], "several hosts"),
        ([HERE, THERE._replace(host=None)], "several hosts"),
        ([HERE, HERE], "see one GPU each"),
        ([HERE._replace(reaches=(True, False)), THERE], "rank 0 cannot write into rank 1's memory"),
        ([HERE, THERE._replace(reaches=(False, True))], "rank 1 cannot write into rank 0's memory"),
        ([HERE, THERE._replace(device=2)], "rank 0 cannot write into rank 1's memory"),
    ],
)
def test_gpus_that_do_not_reach_each_other_are_told_apart(places: list[Place], reason: str | None) -> None:
    found = apart(places)
    assert found is None if reason is None else found is not None and reason in found
