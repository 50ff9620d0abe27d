"""What lies where in a window, what it costs, and what ranks must agree on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeweave.comm.windows import NUM_AREAS, DispatchMap, ReturnMap, Sizes, check_equal, window_bytes
from moeweave.comm.windows_cpu import create_memory, map_memory

SIZES = dict(size=4, max_tokens=512, hidden=256, top_k=4, num_experts=16, dtype=torch.float32)


def test_parts_of_an_area_do_not_overlap() -> None:
    area_map = DispatchMap(sources=3, tokens=5, top_k=2, row_bytes=20, num_local=7)
    area = torch.zeros(area_map.num_bytes, dtype=torch.uint8)
    parts = [area_map.headers(area), area_map.routes(area), area_map.weights(area), area_map.rows(area, torch.float32)]
    assert [tuple(part.shape) for part in parts] == [(3, 11), (3, 10, 2), (3, 10), (15, 5)]
    for number, part in enumerate(parts, start=1):
        part.fill_(number)
    for number, part in enumerate(parts, start=1):
        assert bool((part == number).all())
        part.zero_()
    assert not area.any(), "nothing outside the parts was written"


def test_the_size_is_told_before_anything_is_allocated() -> None:
    assert window_bytes(**SIZES) == NUM_AREAS * DispatchMap(4, 512, 4, 1024, 4).num_bytes == 4_588_032
    exact = window_bytes(**SIZES | dict(top_k=16), combine="exact")
    assert exact == NUM_AREAS * ReturnMap(512 * 16, 1024).num_bytes
    assert window_bytes(**SIZES, codec="fp8") < window_bytes(**SIZES)


def test_rows_beyond_32_bits_have_an_address() -> None:
    area_map = DispatchMap(sources=8, tokens=1 << 18, top_k=8, row_bytes=1 << 13, num_local=4)
    fd, area = create_memory(area_map.num_bytes)  # 17 GB of which two pages are touched
    other = map_memory(fd)
    import os

    os.close(fd)
    area_map.rows(area, torch.int64)[-1] = 7
    assert bool((area_map.rows(other, torch.int64)[-1] == 7).all())
    assert not area_map.rows(other, torch.int64)[0].any()


def test_the_rank_and_the_field_that_differ_are_named() -> None:
    mine = Sizes(num_experts=8, top_k=2, width=24, row_bytes=96)
    check_equal(mine, [mine, mine], "dispatch (round 3)")
    with pytest.raises(RuntimeError, match=r"dispatch \(round 3\): width is 32 on rank 1 and 24 here"):
        check_equal(mine, [mine, replace(mine, width=32)], "dispatch (round 3)")
