"""SwiGLU up to the last offset: the plain form, the kernel's source run as plain C++, and the kernel on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moeweave.kernels_ext import nvrtc
from moeweave.kernels_ext.grouped_mm import grouped_mm
from moeweave.kernels_ext.swiglu import cuda_impl, reference, swiglu
from moeweave.kernels_ext.tolerance import assert_close
from moeweave.moe.experts import Experts, ExpertWeights, is_swiglu, local_experts
from nan_empty import nan_empty
from test_nvrtc import needs_compiler

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(0, 16, [0, 0]), (1, 32, [0, 1]), (63, 48, [10, 10, 41]), (40, 16, [0, 0]), (200, 64, [7, 90, 200])]
# What CUDA C++ has and C++ lacks: a launch is a loop over threads, which the kernels do not order.
AS_CPP = """
#include <cmath>
#include <cstring>
#define __global__
#define __device__
#define __forceinline__ inline
struct uint4 { unsigned x, y, z, w; };
static thread_local struct { unsigned x; } threadIdx, blockIdx, blockDim, gridDim;
static float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
%s
extern "C" void launch(void (*kernel)(Params), Params* params, unsigned blocks, unsigned threads) {
    gridDim.x = blocks, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(*params);
}
"""
compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, ctypes.CDLL]:
    """The kernels by dtype, compiled by the host's compiler."""
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder, found = tmp_path_factory.mktemp("swiglu"), {}
    (folder / "swiglu.cpp").write_text(AS_CPP % cuda_impl.source())
    for dtype in DTYPES:
        ((name, value),) = cuda_impl.defines(dtype)
        out = folder / f"swiglu_{value}.so"
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-D{name}={value}", "-w"]
        subprocess.run([compiler, *options, folder / "swiglu.cpp", "-o", out], check=True, timeout=100)
        found[dtype] = ctypes.CDLL(str(out))
    return found


def run_as_cpp(library: ctypes.CDLL, kernel: str, gate_up_RF: Tensor, offsets_e: Tensor, **tensors: Tensor) -> None:
    params = cuda_impl.params_of(gate_up_RF, offsets_e, **tensors)
    library.launch(getattr(library, kernel), ctypes.byref(params), ctypes.c_uint(3), ctypes.c_uint(32))


def rows_of(num_rows: int, width: int, offsets: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up with NaN past the last offset, a gradient likewise, the offsets."""
    generator = torch.Generator().manual_seed(num_rows)
    gate_up_RF, grad_RI = (torch.randn(num_rows, n, generator=generator) * 4 for n in (width, width // 2))
    gate_up_RF[offsets[-1] :], grad_RI[offsets[-1] :] = float("nan"), float("nan")
    return gate_up_RF.to(dtype), grad_RI.to(dtype), torch.tensor(offsets, dtype=torch.int32)


@torch.enable_grad()
def plain(gate_up_RF: Tensor, grad_RI: Tensor, end: int) -> tuple[Tensor, Tensor]:
    used = gate_up_RF[:end].detach().clone().requires_grad_()
    out = torch.nn.functional.silu(used[:, : used.shape[1] // 2]) * used[:, used.shape[1] // 2 :]
    out.backward(grad_RI[:end].detach())
    assert used.grad is not None
    return out.detach(), used.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows, width, offsets", SIZES)
def test_the_source_computes_the_rows_before_the_last_offset_and_touches_no_other(
    libraries: dict[torch.dtype, ctypes.CDLL], num_rows: int, width: int, offsets: list[int], dtype: torch.dtype
) -> None:
    gate_up_RF, grad_RI, offsets_e = rows_of(num_rows, width, offsets, dtype)
    out_RI, grad_RF = torch.full_like(grad_RI, 77.0), torch.full_like(gate_up_RF, 77.0)
    run_as_cpp(libraries[dtype], "moeweave_swiglu", gate_up_RF, offsets_e, out=out_RI)
    run_as_cpp(libraries[dtype], "moeweave_swiglu_backward", gate_up_RF, offsets_e, grad=grad_RI, grad_gate_up=grad_RF)
    end = offsets[-1]
    want, want_grad = plain(gate_up_RF, grad_RI, end)
    assert_close("out", out_RI[:end], want, dtype)
    assert_close("grad", grad_RF[:end], want_grad, dtype)
    assert bool((out_RI[end:] == 77).all()) and bool((grad_RF[end:] == 77).all())


def test_the_source_rounds_as_torch_does(libraries: dict[torch.dtype, ctypes.CDLL]) -> None:
    """Every bfloat16 as a gate; some differ by a step where the host has another exp."""
    gate_RI = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 8)
    gate_up_RF = torch.cat([gate_RI, torch.full_like(gate_RI, 1.25)], dim=1)
    offsets_e, out_RI = torch.tensor([len(gate_RI)], dtype=torch.int32), torch.empty_like(gate_RI)
    run_as_cpp(libraries[torch.bfloat16], "moeweave_swiglu", gate_up_RF, offsets_e, out=out_RI)
    want = reference.swiglu(gate_up_RF, offsets_e)
    assert torch.equal(out_RI.isnan(), want.isnan())
    differ = (out_RI != want) & ~want.isnan()
    assert int(differ.sum()) <= 16
    assert_close("out", out_RI[want.isfinite()], want[want.isfinite()], torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles(dtype: torch.dtype) -> None:
    code = nvrtc.compile_source(cuda_impl.source(), "swiglu.cu", "compute_90", dict(cuda_impl.defines(dtype))).decode()
    assert all(f".entry {kernel}" in code for kernel in cuda_impl.KERNELS)
    assert "ld.global.v4" in code and "st.global.v4" in code and ".local" not in code


def test_the_plain_form_is_the_activation() -> None:
    gate_up_RF, _, offsets_e = rows_of(63, 48, [10, 63], torch.float32)
    experts = Experts(8, 24, 2)
    assert is_swiglu(experts) and not is_swiglu(Experts(8, 24, 2, activation="gelu"))
    assert torch.equal(swiglu(gate_up_RF, offsets_e), experts._apply_gate(gate_up_RF))
    other = SimpleNamespace(_apply_gate=experts._apply_gate)
    assert not is_swiglu(other)  # type: ignore[arg-type]
    assert experts.weights().is_swiglu and not Experts(8, 24, 2, gated=False).weights().is_swiglu


def test_refusals() -> None:
    offsets_e = torch.tensor([1], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"gate_up \(torch.float32, \(2, 7\)\) must be floating point \[R, F\], F even"
    ):
        swiglu(torch.ones(2, 7), offsets_e)
    with pytest.raises(ValueError, match="cuda: it runs on NVIDIA GPUs, not cpu"):
        swiglu(torch.ones(2, 8), offsets_e, impl="cuda")


class _Garbage(torch.autograd.Function):
    """Rows past the end as the kernel leaves them: not written, forward and backward."""

    @staticmethod
    def forward(ctx, gate_up_RF: Tensor, offsets_e: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate_up_RF, offsets_e)
        out_RI = reference.swiglu(gate_up_RF, offsets_e)
        out_RI[int(offsets_e[-1]) :] = float("nan")
        return out_RI

    @staticmethod
    def backward(ctx, grad_RI: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        gate_up_RF, offsets_e = ctx.saved_tensors
        end, grad_RF = int(offsets_e[-1]), torch.full_like(gate_up_RF, float("nan"))
        grad_RF[:end] = plain(gate_up_RF, grad_RI, end)[1]
        return grad_RF, None


@pytest.mark.parametrize("exact", [False, True])
def test_undefined_rows_between_the_products_reach_nothing(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    """With the kernel in place: outputs and gradients of an expert layer whose room is larger than its rows."""
    experts, offsets_e = Experts(16, 24, 3), torch.tensor([4, 4, 11], dtype=torch.int32)
    rows_RD = torch.randn(30, 16)
    rows_RD[11:] = float("nan")

    def grads() -> list[Tensor]:
        leaf = rows_RD.clone().requires_grad_()
        experts.zero_grad()
        with nan_empty():
            out_RD = local_experts(experts.weights(), leaf, offsets_e, exact=exact)
            probe = torch.ones_like(out_RD)
            probe[11:] = float("nan") if exact else 1.0
            out_RD.backward(probe)
        assert leaf.grad is not None
        params = [param.grad.clone() for param in experts.parameters()]
        return [out_RD.detach()[:11], leaf.grad[:11], *params] if exact else [out_RD.detach(), leaf.grad, *params]

    want = grads()
    monkeypatch.setattr("moeweave.moe.experts.swiglu", _Garbage.apply)
    assert all(map(torch.equal, grads(), want))
    assert all(bool(each.isfinite().all()) for each in want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows, width, offsets", [*SIZES, (70_000, 1536, [9, 1000])])
def test_the_kernel(num_rows: int, width: int, offsets: list[int], dtype: torch.dtype) -> None:
    gate_up_RF, grad_RI, offsets_e = (tensor.cuda() for tensor in rows_of(num_rows, width, offsets, dtype))
    leaf, end = gate_up_RF.clone().requires_grad_(), offsets[-1]
    with nan_empty():
        out_RI = swiglu(leaf, offsets_e, impl="cuda")
        out_RI.backward(grad_RI)
    want, want_grad = plain(gate_up_RF, grad_RI, end)
    assert leaf.grad is not None
    assert_close("out", out_RI[:end].detach(), want, dtype)
    assert_close("grad", leaf.grad[:end], want_grad, dtype)
    assert bool(out_RI[end:].isnan().all()) and bool(leaf.grad[end:].isnan().all()), "neither read nor written"


@pytest.mark.gpu
def test_the_kernel_feeds_the_grouped_product_in_a_graph() -> None:
    gate_up_RF, _, offsets_e = (tensor.cuda() for tensor in rows_of(512, 256, [100, 300], torch.bfloat16))
    weight_EDF = torch.randn(2, 128, 64, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        return grouped_mm(swiglu(gate_up_RF, offsets_e, impl="cuda"), weight_EDF, offsets_e)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RF = run()
    gate_up_RF.copy_(torch.randn_like(gate_up_RF))
    for ends in ([100, 300], [0, 7], [0, 0]):
        offsets_e.copy_(torch.tensor(ends))
        graph.replay()
        want = grouped_mm(reference.swiglu(gate_up_RF, offsets_e), weight_EDF, offsets_e)
        assert torch.equal(out_RF, want)


def test_weights_without_the_flag_keep_their_own_activation() -> None:
    weights = ExpertWeights(
        gate_up=torch.randn(1, 8, 4), down=torch.randn(1, 4, 4), apply_gate=lambda rows: rows[:, :4] + rows[:, 4:]
    )
    rows_RD, offsets_e = torch.randn(3, 4), torch.tensor([3], dtype=torch.int32)
    up = rows_RD @ weights.gate_up[0].T
    assert_close(
        "out", local_experts(weights, rows_RD, offsets_e), (up[:, :4] + up[:, 4:]) @ weights.down[0].T, torch.float32
    )
