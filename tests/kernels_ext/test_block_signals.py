"""The signals of blocks as the compiler sees them: what ranks of GPUs do with them is in test_blocks_ranks.py."""

from __future__ import annotations

import re

import pytest

from moeweave.comm.blocks_cuda import CHANNELS, DeviceSignals
from moeweave.kernels_ext import block_signals, nvrtc, onesided
from test_nvrtc import needs_compiler
from test_onesided_source import wrong_orders


@needs_compiler
@pytest.mark.parametrize("arch", ["compute_90", "sm_90"])
def test_compiles(arch: str) -> None:
    code = nvrtc.compile_source(block_signals.source(), "block_signals.cu", arch)
    assert all(kernel.encode() in code for kernel in block_signals.KERNELS)


@needs_compiler
def test_every_signal_comes_right_after_a_fence() -> None:
    ptx = nvrtc.compile_source(block_signals.source(), "block_signals.cu", "compute_90").decode()
    assert len(re.findall(r"st\.relaxed\.sys\.global\.u64", ptx)) >= 2
    assert wrong_orders(ptx) == []


def test_there_is_room_for_every_channel() -> None:
    assert len(CHANNELS) <= block_signals.MAX_CHANNELS
    params = dict(onesided.params_type()._fields_)
    assert {"kind", "flags", "rows", "capacity", "at_acks", "at_cells"} <= set(params)
    assert DeviceSignals.num_bytes(4) == 128 + 2 * 8 * len(CHANNELS) * 4
