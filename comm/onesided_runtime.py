"""What the one-sided kernels run on: a CUDA device's streams, with kernels that its own compiler made.

Engines know only the protocol, so that tests can run the same kernels' source where there is no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from moeweave.comm.pending import Pending
from moeweave.kernels_ext import onesided

T = TypeVar("T")


class Compiled(NamedTuple):
    """What the kernels are compiled for: dtype of the rows, format and scale of comm/codec.py, routes a token."""

    dtype: torch.dtype
    format: str
    scale: str
    top_k: int


class Runtime(Protocol):
    """Compiles and runs kernels, in the order in which they are launched.

    Attributes:
        threads: of a block, by kernel.
    """

    threads: Mapping[str, int]

    def launch(self, kernel: str, grid: int, params: ctypes.Structure, shared_bytes: int, compiled: Compiled) -> None:
        """Run a kernel, `grid` blocks of `threads[kernel]`, each with so much dynamic shared memory."""
        ...

    def synchronize(self) -> None:
        """Return when everything that was launched has ended."""
        ...

    def post(self, inputs: Sequence[Tensor], call: Callable[[], T], outputs: Callable[[T], list[Tensor]]) -> Pending[T]:
        """`call`, which launches, beside what comes next; its result is joined at `wait`.

        inputs: what it reads. outputs: the tensors of its result.
        """
        ...


class CudaRuntime:
    """The current stream of a CUDA device, and a stream of its own for what is posted.

    Args:
        device: with an index.
        variants: of the kernels, in place of those in `onesided.VARIANTS`.
    """

    threads: Mapping[str, int] = onesided.THREADS

    def __init__(self, device: torch.device, variants: onesided.Variants = ()) -> None:
        self.device, self.variants = device, variants
        self._stream = torch.cuda.Stream(device)
        # End of the last posted operation, until something waited for it: launches on other streams come after it.
        self._posted: torch.cuda.Event | None = None

    def launch(self, kernel: str, grid: int, params: ctypes.Structure, shared_bytes: int, compiled: Compiled) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._posted is not None and stream != self._stream:
            stream.wait_event(self._posted)
        module = onesided.kernels(*compiled, self.device.index or 0, self.variants)
        module.launch(kernel, grid, self.threads[kernel], params, shared_bytes)

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def post(self, inputs: Sequence[Tensor], call: Callable[[], T], outputs: Callable[[T], list[Tensor]]) -> Pending[T]:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            result = call()
        for tensor in inputs:
            tensor.record_stream(stream)
        done = self._posted = stream.record_event()

        def finish() -> T:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(done)
            if self._posted is done:
                self._posted = None
            for tensor in outputs(result):
                tensor.record_stream(now)
            return result

        return Pending(finish)
