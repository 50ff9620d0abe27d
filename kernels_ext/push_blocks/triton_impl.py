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
    """Return None, or why the kernel cannot run on blocks like the first tensor's rows."""
    x_WN = tensors[0]
    if x_WN.device.type != "cuda":
        return f"it runs on CUDA devices, not {x_WN.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x_WN.shape[1] % 16:
        return f"blocks must be multiples of 16 bytes, not {x_WN.shape[1]}"
    return None


def push(x_WN: Tensor, peers: PeerWindows, num_programs: int = 0) -> None:
    """Same contract as `reference.push`; `num_programs` of them share the steps, 0 is one for each multiprocessor."""
    from moeweave.kernels_ext.push_blocks.triton_kernel import push_kernel

    words_WN = x_WN.view(torch.int32)
    num_ranks, num_words = words_WN.shape
    if num_ranks == 1 or num_words == 0:
        return
    steps = (num_ranks - 1) * -(-num_words // WORDS_A_STEP)
    programs = min(num_programs or torch.cuda.get_device_properties(x_WN.device).multi_processor_count, steps)
    push_kernel[(programs,)](words_WN, peers.addresses, peers.rank, num_ranks, num_words, WORDS_A_STEP, num_warps=16)
