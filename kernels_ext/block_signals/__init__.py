"""Signals around blocks that are written into peers' windows: open before the writes, close after them.

Two kernels of one block, compiled with link.cu of the one-sided exchange, whose waits, deadlines and `Params` they
share. No GPU has run them. Who calls them is `comm/blocks_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeweave.kernels_ext import nvrtc, onesided

KERNELS = ("moeweave_blocks_open", "moeweave_blocks_close")
THREADS = 512
MAX_CHANNELS = 32  # bits of `Params.flags`
STATE_WORDS = onesided.EPOCHS + MAX_CHANNELS


def source(before: Sequence[str] = ()) -> str:
    """The one-sided kernels' files to link.cu (or `before`, other files than these), then the two kernels."""
    folder, files = Path(__file__).parent, list(before) or onesided.SOURCES
    link = folder.parent / "onesided" / "csrc"
    parts = [*(link / name for name in files[: files.index("link.cu") + 1]), folder / "csrc" / "block_signals.cu"]
    return "\n".join(part.read_text(encoding="utf-8") for part in parts)


def kernels(device: int) -> nvrtc.Module:
    """Loaded at once: none may be loaded beside a kernel that spins."""
    return nvrtc.load(source(), "block_signals.cu", KERNELS, (), device)
