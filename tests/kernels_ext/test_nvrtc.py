"""The compiler that torch carries, called directly: no nvcc, no C compiler, no toolkit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from moeweave.kernels_ext import nvrtc

KERNEL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.f; }'


def reason_without() -> str | None:
    try:
        nvrtc.compiler()
    except OSError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(reason_without() is not None, reason=reason_without() or "")


def bare_environment() -> dict[str, str]:
    """Without nvcc, gcc and a toolkit: an empty folder for PATH."""
    hidden = ("PATH", "CUDA_HOME", "CUDA_PATH", "CC", "CXX", "CUDAHOSTCXX")
    return {key: value for key, value in os.environ.items() if key not in hidden} | {"PATH": "/nonexistent"}


@needs_compiler
def test_ptx_is_text_of_the_architecture() -> None:
    ptx = nvrtc.compile_source(KERNEL, "twice.cu", "compute_90").decode()
    assert ".target sm_90" in ptx
    assert ".entry twice" in ptx


@needs_compiler
def test_machine_code_is_elf() -> None:
    assert nvrtc.compile_source(KERNEL, "twice.cu", "sm_90")[:4] == b"\x7fELF"


@needs_compiler
def test_defines_reach_the_source() -> None:
    source = "constexpr int n = WIDTH;\nstatic_assert(n == 7);\n" + KERNEL
    nvrtc.compile_source(source, "twice.cu", "compute_90", {"WIDTH": 7})
    with pytest.raises(nvrtc.CompileError, match="static assertion"):
        nvrtc.compile_source(source, "twice.cu", "compute_90", {"WIDTH": 8})


@needs_compiler
def test_an_error_shows_the_compilers_log() -> None:
    with pytest.raises(nvrtc.CompileError, match=r'(?s)broken\.cu for compute_90.*"oops" is undefined'):
        nvrtc.compile_source("__device__ int f() { return oops; }", "broken.cu", "compute_90")


@needs_compiler
def test_compiles_without_nvcc_and_gcc() -> None:
    code = (
        "import shutil, sys; from moeweave.kernels_ext import nvrtc, onesided; import torch\n"
        "assert not any(map(shutil.which, ('nvcc', 'gcc', 'cc', 'ptxas')))\n"
        "options = dict(onesided.defines(torch.bfloat16, 'none', 'token', 8))\n"
        "assert b'moeweave_dispatch' in nvrtc.compile_source(onesided.source(), 'onesided.cu', 'compute_90', options)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_launches_without_nvcc_and_gcc() -> None:
    """The kernels themselves, in a process that could not build an extension; what Triton needs is not there."""
    assert shutil.which("python3"), "the interpreter is called by its full path"
    case = (
        "from onesided_cases import Case, Inputs, round_trip, setup; c = Case(); round_trip(c, *setup(c), Inputs.of(c))"
    )
    folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "comm")
    code = f"import shutil, sys; sys.path.insert(0, {folder!r}); assert not shutil.which('gcc'); {case}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
