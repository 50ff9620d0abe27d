"""What kernels report to the host: which wait passed its deadline, and for whom.

A failing kernel writes to pinned memory, which is read without waiting for the device.
"""

from __future__ import annotations

import torch

from moeweave.comm.windows_cuda import CudaWindow
from moeweave.kernels_ext import onesided


class OneSidedError(RuntimeError):
    """A rank died, is late, or failed. Results of the operations since are NaN, and later ones fail at once."""


class KernelReports:
    """Base of what launches kernels over a window; `watchdog.watch` takes it.

    Args:
        window: of this rank.
        timeout: seconds that one wait of a kernel may take.

    Attributes:
        window, timeout: as given.
        report: int64 in pinned memory: 5 words of a failure, and behind 8 those of the kernels.
        told: whether a reported failure was raised.
    """

    def __init__(self, window: CudaWindow, timeout: float) -> None:
        self.window, self.timeout, self.told = window, timeout, False
        pinned = window.peers.device.type == "cuda"
        self.report = torch.zeros(8 + onesided.MAX_BLOCKS, dtype=torch.int64, pin_memory=pinned)

    def names_of(self, kind: int) -> tuple[str, str]:
        """Of an operation, by the number that its kernels have: what it belongs to, and its own name."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise OneSidedError if an operation that has ended has failed. No synchronisation."""
        error = self.error()
        if error is not None:
            self.told = True
            raise error

    def error(self) -> OneSidedError | None:
        """What an operation that has ended has reported. No synchronisation."""
        failed, kind, wait, awaited, reporter = self.report[:5].tolist()
        if not failed:
            return None
        (whole, operation), rank = self.names_of(kind), self.window.rank
        said = "" if reporter == rank else f", as rank {reporter} reports"
        return OneSidedError(
            f"{whole}, rank {rank} of {self.window.size}: {operation} waited {self.timeout:g} s for the "
            f"{onesided.WAITS[wait]} of rank {awaited}{said}. Its results are NaN. Restart the ranks of this group."
        )
