"""Blocks to peers by the device's cores, in Triton: 16 warps a program, 16 KiB a step, plain loads and stores.

Letters: W ranks, N words (4 bytes) of a block.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeweave.kernels_ext.push_blocks import PeerWindows

name = "triton"

WORDS_A_STEP = 4096


def supports(*tensors: Tensor) -> str | None:
    """Return None, or why the kernel cannot run on blocks like the tensors' rows."""
    x_WN = tensors[0]
    if x_WN.device.type != "cuda":
        return f"it runs on CUDA devices, not {x_WN.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for each_WN in tensors:
        if each_WN.shape[1] % 16 or each_WN.stride(0) % 16 or each_WN.storage_offset() % 16:
            return f"blocks must be multiples of 16 bytes that lie at such, not {tuple(each_WN.shape)}"
    return None


def push(x_WN: Tensor, peers: PeerWindows, num_programs: int = 0) -> None:
    """Same contract as `reference.push`; `num_programs` of them share the steps, 0 is one for each multiprocessor."""
    from moeweave.kernels_ext.push_blocks.triton_kernel import push_kernel

    num_ranks, num_words = x_WN.shape[0], x_WN.shape[1] // 4
    if num_ranks == 1 or num_words == 0:
        return
    words_WN, window_WN = x_WN.view(torch.int32), peers.windows[peers.rank]
    strides = words_WN.stride(0), window_WN.stride(0) // 4
    steps = (num_ranks - 1) * -(-num_words // WORDS_A_STEP)
    programs = min(num_programs or torch.cuda.get_device_properties(x_WN.device).multi_processor_count, steps)
    sizes = (peers.rank, num_ranks, num_words, *strides, WORDS_A_STEP)
    push_kernel[(programs,)](words_WN, peers.addresses, *sizes, num_warps=16)
