"""CUDA C++ compiled at first use, by the libnvrtc that torch carries.

No nvcc, no C compiler, no Python.h and no CUDA toolkit: one source string without headers goes in, machine code for
the device's architecture comes out, and the driver loads it. Modules are cached for the process by source, defines,
architecture and device. Kernels take one structure by value and run on torch's current stream.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

_BY_VALUE = ctypes.c_void_p * 1
_MAX_DYNAMIC_SHARED = 8  # of the driver's CUfunction_attribute


class CompileError(RuntimeError):
    """libnvrtc refused a source; the message is its log."""


@functools.cache
def compiler() -> ctypes.CDLL:
    """libnvrtc of torch's CUDA version. Raises OSError, with the places that were searched, if it is not there."""
    version = torch.version.cuda or "13.0"
    names = [f"libnvrtc.so.{version.split('.')[0]}", f"libnvrtc.so.{version}"]
    for folder in _library_folders():
        # libnvrtc opens its built-ins by name and does not look beside itself: they must be in the process before.
        for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        for path in (folder / name for name in names):
            if path.exists():
                return ctypes.CDLL(str(path))
    found = next((library for name in names if (library := _by_name(name)) is not None), None)
    if found is None:
        where = ", ".join(map(str, _library_folders())) or "no nvidia packages"
        raise OSError(
            f"{' or '.join(names)} must be loadable (searched {where} and the loader's path). "
            "Install nvidia-cuda-nvrtc of torch's CUDA version."
        )
    return found


def _by_name(name: str) -> ctypes.CDLL | None:
    """A library that the loader finds by itself."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _library_folders() -> list[Path]:
    """Where pip puts NVIDIA's libraries: nvidia/cu13/lib, nvidia/cuda_nvrtc/lib; and torch's own lib folder."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    folders = [folder for root in roots for folder in sorted(root.glob("*/lib")) if list(folder.glob("libnvrtc.so*"))]
    return [*folders, Path(torch.__file__).parent / "lib"]


def compile_source(source: str, name: str, arch: str, defines: Mapping[str, int] | None = None) -> bytes:
    """Machine code for `arch` "sm_90", or PTX for "compute_90". Raises CompileError with the compiler's log."""
    nvrtc, program = compiler(), ctypes.c_void_p()
    options = [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        *(f"-D{key}={value}" for key, value in (defines or {}).items()),
    ]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _ok(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None), name)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), words) != 0:
            raise CompileError(f"{name} for {arch}: {_text(nvrtc, program, 'ProgramLog').decode()}")
        return _text(nvrtc, program, "CUBIN" if arch.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _ok(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _ok(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw.rstrip(b"\0") if what != "CUBIN" else buffer.raw


def _ok(code: int, what: str) -> None:
    if code != 0:
        raise CompileError(f"libnvrtc returned {code} for {what}.")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *args: object) -> None:
    code = getattr(_driver(), name)(*args)
    if code != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name} failed: {(text.value or b'unknown error').decode()} ({code}).")


class Module:
    """Kernels of one source on one device, all of them loaded: none is loaded later, beside a kernel that spins.

    Args:
        code: what `compile_source` returned for the device's architecture.
        kernels: names of its `extern "C"` kernels.
        device: index of the CUDA device.
    """

    def __init__(self, code: bytes, kernels: Iterable[str], device: int) -> None:
        self._context = ctypes.c_void_p()
        torch.cuda.init()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        _call("cuCtxSetCurrent", self._context)
        self._module = ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(self._module), code)
        self._kernels = {name: self._load(name) for name in kernels}
        self._device = device
        self._room: dict[str, int] = {}

    def _load(self, name: str) -> ctypes.c_void_p:
        kernel = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(kernel), self._module, name.encode())
        _call("cuFuncLoad", kernel)
        return kernel

    def launch(self, name: str, grid: int, threads: int, params: ctypes.Structure, shared_bytes: int = 0) -> None:
        """Run a kernel of one structure on torch's current stream of the module's device."""
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        argument = _BY_VALUE(ctypes.addressof(params))
        # A thread of autograd may come here before it has called the runtime: it then has no context yet.
        _call("cuCtxSetCurrent", self._context)
        if shared_bytes > self._room.get(name, 48 << 10):
            _call("cuFuncSetAttribute", self._kernels[name], _MAX_DYNAMIC_SHARED, shared_bytes)
            self._room[name] = shared_bytes
        _call("cuLaunchKernel", self._kernels[name], grid, 1, 1, threads, 1, 1, shared_bytes, stream, argument, None)


@functools.cache
def load(source: str, name: str, kernels: tuple[str, ...], defines: tuple[tuple[str, int], ...], device: int) -> Module:
    """The module of `source`, compiled for `device`'s architecture at the first call."""
    major, minor = torch.cuda.get_device_capability(device)
    return Module(compile_source(source, name, f"sm_{major}{minor}", dict(defines)), kernels, device)
