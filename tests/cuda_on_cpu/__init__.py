"""The one-sided kernels' own source on a CPU: compiled by g++ and run with every CUDA thread as a fiber.

`ptx.cu` alone is replaced (ptx.hpp); the other files are compiled as they stand. Ranks are threads of this
process: each launches in its own order, and while all wait, the blocks of every rank run by turns in an order that a
seed repeats. What a launch brought is there when it returns.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch import Tensor

from moeweave.comm.onesided_runtime import Compiled
from moeweave.comm.pending import Pending
from moeweave.kernels_ext import onesided

T = TypeVar("T")
HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC")
HEADER = '#include "ptx.hpp"\n'
# What a module is asked for: its kernels by address, and where its static shared memory lies.
RUN = 'extern "C" void run_{0}(const void* params) {{ {0}(*(const Params*)params); }}\n'
SHARED = """
extern "C" {
extern char __start_shared_memory, __stop_shared_memory;
char* shared_start() { return &__start_shared_memory; }
char* shared_stop() { return &__stop_shared_memory; }
}
"""

_COMPILING = threading.Lock()  # a library has one set of static variables: no two modules of it

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile CUDA source for this CPU")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of compiled libraries, gone with this process."""
    return tempfile.TemporaryDirectory(prefix="cuda-on-cpu-")


def _library(text: str, defines: Mapping[str, int], mode: int) -> ctypes.CDLL:
    """A C++ text, compiled and loaded."""
    flags = [*FLAGS, f"-I{HERE}", *(f"-D{key}={value}" for key, value in defines.items())]
    path = Path(_folder().name) / f"{hashlib.sha256(repr((flags, text)).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(path)]
        subprocess.run(command, input=text.encode(), check=True, timeout=120)
    return ctypes.CDLL(str(path), mode)


@functools.cache
def _scheduler() -> ctypes.CDLL:
    library = _library((HERE / "fibers.cpp").read_text(encoding="utf-8"), {}, ctypes.RTLD_GLOBAL)
    library.add_module.restype = ctypes.c_void_p
    library.add_module.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.set_seed.argtypes = [ctypes.c_ulonglong]
    library.start_grid.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int,
        ctypes.c_int,
    ]  # fmt: skip
    return library


class Module:
    """The kernels of one source: `name` -> address of a function that takes the address of its parameters."""

    def __init__(self, text: str, kernels: Sequence[str], defines: Mapping[str, int]) -> None:
        scheduler = _scheduler()
        runs = "".join(RUN.format(kernel) for kernel in kernels)
        library = _library(HEADER + text + runs + SHARED, defines, ctypes.RTLD_LOCAL)
        library.shared_start.restype = library.shared_stop.restype = ctypes.c_void_p
        self.handle = scheduler.add_module(library.shared_start(), library.shared_stop())
        self.kernels = {kernel: ctypes.cast(library[f"run_{kernel}"], ctypes.c_void_p) for kernel in kernels}


def onesided_text() -> str:
    """The kernels' source without its PTX."""
    return onesided.source(tuple(name for name in onesided.SOURCES if name != "ptx.cu"))


@functools.cache
def _onesided_module(text: str, compiled: Compiled, variants: onesided.Variants) -> Module:
    return Module(text, tuple(onesided.THREADS), dict(onesided.defines(*compiled, variants)))


class Machine:
    """Ranks as threads, and the blocks of their kernels, which run while every rank waits for one.

    Args:
        seed: of the order in which warps run.
    """

    def __init__(self, seed: int = 0) -> None:
        self._changed = threading.Condition()
        self._running: set[int] = set()  # ranks whose thread runs Python
        self._waiting: set[int] = set()  # ranks that wait for the kernel they launched
        self._launched: dict[int, tuple[Any, ...]] = {}  # what they launched since
        self._wrong: str | None = None
        _scheduler().set_seed(seed)

    def run(self, call: Callable[[int], T], ranks: Sequence[int]) -> list[T]:
        """`call(rank)` on a thread of each rank, and what they launch. Raises what a call raised."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = call(rank)
            except BaseException as error:
                errors.append(error)
            with self._changed:
                self._running.discard(rank)
                self._changed.notify_all()

        self._running, self._wrong = set(ranks), None
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        self._drive()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[rank] for rank in ranks]

    def launch(
        self, rank: int, module: Module, kernel: str, grid: int, threads: int, params: bytes, shared_bytes: int
    ) -> None:
        """Called on the rank's thread: returns when the kernel has ended."""
        arguments = (rank, module.handle, module.kernels[kernel], grid, threads, params, len(params), shared_bytes)
        with self._changed:
            assert rank in self._running, "a launch outside of run()"
            self._launched[rank] = arguments
            self._running.discard(rank)
            self._waiting.add(rank)
            self._changed.notify_all()
            self._changed.wait_for(lambda: rank not in self._waiting)
            if self._wrong is not None:
                raise RuntimeError(f"{kernel} of rank {rank}: {self._wrong}.")

    def _drive(self) -> None:
        said = ctypes.create_string_buffer(256)
        with self._changed:
            while True:
                self._changed.wait_for(lambda: not self._running)
                if not self._waiting:
                    return
                for rank in sorted(self._launched):  # in one order, however the threads ran
                    _scheduler().start_grid(*self._launched.pop(rank))
                rank = _scheduler().run_until_one_ends(said, len(said))
                ended = {rank} if rank >= 0 else set(self._waiting)
                self._wrong = None if rank >= 0 else said.value.decode()
                self._waiting -= ended
                self._running |= ended
                self._changed.notify_all()


class CpuRuntime:
    """What one rank's engine launches on, see moeweave.comm.onesided_runtime.

    Args:
        threads: of a block of any kernel, a multiple of 32 and at least 64.
        text: the kernels' source, if it is to be another than `onesided_text()`.
        variants: in place of those in `onesided.VARIANTS`.
    """

    def __init__(
        self, machine: Machine, rank: int, threads: int = 64, text: str | None = None, variants: onesided.Variants = ()
    ) -> None:
        self.machine, self.rank, self.text, self.variants = machine, rank, text or onesided_text(), variants
        self.threads = dict.fromkeys(onesided.THREADS, threads)

    def launch(self, kernel: str, grid: int, params: ctypes.Structure, shared_bytes: int, compiled: Compiled) -> None:
        with _COMPILING:
            module = _onesided_module(self.text, compiled, self.variants)
        self.machine.launch(self.rank, module, kernel, grid, self.threads[kernel], bytes(params), shared_bytes)

    def synchronize(self) -> None:
        """Launches return when they have ended."""

    def post(self, inputs: Sequence[Tensor], call: Callable[[], T], outputs: Callable[[T], Any]) -> Pending[T]:
        return Pending.ready(call())
