"""Blocks to peers: every byte at its place and no other written; the kernel against the plain copies on one GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeweave.kernels_ext.push_blocks import OP, PeerWindows, push
from moeweave.kernels_ext.registry import select


def blocks(num_ranks: int, num_bytes: int, rank: int, device: str) -> tuple[Tensor, list[Tensor]]:
    x_WN = torch.randint(0, 255, (num_ranks, num_bytes), dtype=torch.uint8).to(device)
    return x_WN, [torch.full((num_ranks, num_bytes), 255, dtype=torch.uint8, device=device) for _ in range(num_ranks)]


def check(x_WN: Tensor, windows: list[Tensor], rank: int) -> None:
    for peer, window in enumerate(windows):
        for source in range(len(windows)):
            if source == rank and peer != rank:
                assert torch.equal(window[source], x_WN[peer])
            else:
                assert bool((window[source] == 255).all()), "nobody may write here"


@pytest.mark.parametrize("num_bytes", [0, 1, 63, 4096])
@pytest.mark.parametrize("num_ranks, rank", [(1, 0), (2, 1), (4, 2)])
def test_blocks_go_to_their_places(num_ranks: int, rank: int, num_bytes: int) -> None:
    x_WN, windows = blocks(num_ranks, num_bytes, rank, "cpu")
    push(x_WN, PeerWindows.of(windows, rank))
    check(x_WN, windows, rank)


@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", [16, 16368, 16384, 1 << 20, (1 << 20) + 16])
@pytest.mark.parametrize("num_ranks, rank", [(1, 0), (2, 1), (4, 2), (8, 0)])
@pytest.mark.parametrize("num_programs", [0, 1, 7])
def test_the_kernel_writes_what_copies_would(num_ranks: int, rank: int, num_bytes: int, num_programs: int) -> None:
    x_WN, windows = blocks(num_ranks, num_bytes, rank, "cuda")
    peers = PeerWindows.of(windows, rank)
    assert select(OP, x_WN).name == "triton"
    push(x_WN, peers, num_programs=num_programs, impl="triton")
    torch.cuda.synchronize()
    check(x_WN, windows, rank)


@pytest.mark.parametrize("device, impl", [("cpu", "reference"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("same_for_all", [False, True])
def test_parts_of_blocks_that_lie_apart(same_for_all: bool, device: str, impl: str) -> None:
    x_WN, wholes = blocks(4, 4096, 2, device)
    if same_for_all:
        x_WN = x_WN[:1].expand(4, -1)
    columns = slice(1024, 3072)
    peers = PeerWindows.of([whole[:, columns] for whole in wholes], 2)
    push(x_WN[:, columns], peers, impl=impl)
    check(x_WN[:, columns], [whole[:, columns] for whole in wholes], 2)
    for whole in wholes:
        assert bool((whole[:, :1024] == 255).all()) and bool((whole[:, 3072:] == 255).all())


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_bytes() -> None:
    num_bytes = (1 << 31) + 16
    if torch.cuda.mem_get_info()[0] < 6 * num_bytes:
        pytest.skip("needs 13 GB of free GPU memory")
    x_WN = torch.zeros(2, num_bytes, dtype=torch.uint8, device="cuda")
    x_WN[:, -16:] = 7
    window = torch.full_like(x_WN, 255)
    push(x_WN, PeerWindows.of([x_WN, window], 0), impl="triton")
    assert bool((window[0, -16:] == 7).all())
    assert bool((window[0, :-16] == 0).all())
    assert bool((window[1, -16:] == 255).all())


def test_other_shapes_are_refused() -> None:
    x_WN, windows = blocks(2, 32, 0, "cpu")
    with pytest.raises(ValueError, match=r"x \(torch.uint8, \(2, 16\)\) must be uint8 \(2, 32\)"):
        push(x_WN[:, :16], PeerWindows.of(windows, 0))
    with pytest.raises(ValueError, match=r"impl='triton' cannot run push_blocks .* it runs on CUDA devices, not cpu"):
        push(x_WN, PeerWindows.of(windows, 0), impl="triton")
    assert bool((windows[1] == 255).all())
