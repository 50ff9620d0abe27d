"""Signals around blocks that are written into peers' windows: open before the writes, close after them.

Two kernels of one block, compiled with link.cu of the one-sided exchange, whose waits, deadlines and `Params` they
share. No GPU has run them. Who calls them is `comm/blocks_cuda.py`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from moeweave.kernels_ext import nvrtc, onesided

KERNELS = ("moeweave_blocks_open", "moeweave_blocks_close")
THREADS = 512
MAX_CHANNELS = 32  # bits of `Params.flags`
STATE_WORDS = onesided.EPOCHS + MAX_CHANNELS


@functools.cache
def source() -> str:
    """Sources of the one-sided kernels to link.cu, then the two kernels."""
    folder = Path(__file__).parent
    before = onesided.SOURCES[: onesided.SOURCES.index("link.cu") + 1]
    files = [*(folder.parent / "onesided/csrc" / name for name in before), folder / "csrc/block_signals.cu"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def kernels(device: int) -> nvrtc.Module:
    """Loaded at once: none may be loaded beside a kernel that spins."""
    return nvrtc.load(source(), "block_signals.cu", KERNELS, (), device)
