"""Cases of the CUDA engine for virtual ranks, on one GPU or emulated, compared with the reference in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_on_cpu import needs_gxx
from emulated_ranks import EmulatedRanks, emulated_engines
from moeweave.comm.codec import decode_rows, encode_rows, wire_width
from moeweave.comm.onesided_cuda import CudaArrived, CudaEngine
from moeweave.comm.windows_cuda import WindowMap
from moeweave.kernels_ext.onesided import reference
from virtual_ranks import Streams, virtual_engines

Ranks = Streams | EmulatedRanks

# A GPU where there is one; the emulation everywhere else, which is the same source.
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_gxx), pytest.param("cuda", marks=pytest.mark.gpu)]
)


def on_devices_of(name: str, values: Sequence[Any], quick: Callable[[Any], bool]) -> pytest.MarkDecorator:
    """`on_devices` beside an argument, the emulation slow for values that are not `quick`: each needs a compilation."""
    cpu = [pytest.param(v, "cpu", marks=[needs_gxx, *([] if quick(v) else [pytest.mark.slow])]) for v in values]
    return pytest.mark.parametrize(
        f"{name}, device", [*cpu, *(pytest.param(v, "cuda", marks=pytest.mark.gpu) for v in values)], ids=str
    )


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...] = (37, 64, 1, 50)
    width: int = 512
    num_experts: int = 16
    top_k: int = 4
    max_tokens: int = 64
    dtype: torch.dtype = torch.bfloat16
    routing: str = "spread"
    format: str = "none"
    scale: str = "token"
    exact: bool = False
    align: int = 1
    device: str = "cuda"

    @property
    def world(self) -> int:
        return len(self.tokens)

    @property
    def window(self) -> WindowMap:
        row = self.width * self.dtype.itemsize
        return WindowMap(
            size=self.world, num_experts=self.num_experts, top_k=self.top_k, max_tokens=self.max_tokens,
            row_bytes=max(row, wire_width(self.format, self.scale, self.width, self.dtype)), back_bytes=row + 256,
            exact=self.exact,
        )  # fmt: skip

    def coded(self, rows: Tensor) -> Tensor:
        """As on the link, by the CPU: on CUDA, torch divides by a number by multiplying with its reciprocal."""
        return self.decoded(rows).to(rows.dtype)

    def decoded(self, rows: Tensor) -> Tensor:
        """`coded` before it is rounded, float32."""
        if self.format == "none":
            return rows.float()
        wire = encode_rows(rows.cpu(), self.format, self.scale)
        return decode_rows(wire, self.format, self.scale, rows.shape[1], torch.float32).to(rows.device)


def routing(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    shape = case.tokens[rank], case.top_k
    if case.routing == "hot":  # one expert for everybody, and nothing else
        ids = torch.full(shape, -1, device=case.device, dtype=torch.int64)
        ids[:, 0] = case.num_experts - 1
        return ids
    scores = torch.rand(shape[0], case.num_experts, device=case.device, generator=generator)
    ids = scores.topk(case.top_k, dim=1).indices
    if case.routing == "holes":
        holes = torch.rand(shape, device=case.device, generator=generator)
        ids = torch.where(holes < 0.4, -1, torch.where(holes > 0.9, case.num_experts + 3, ids))
    return torch.full_like(ids, -1) if case.routing == "none" else ids


@dataclass
class Inputs:
    xs: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Inputs:
        g = torch.Generator(case.device).manual_seed(seed)
        ranks = range(case.world)
        xs = [torch.randn(case.tokens[r], case.width, device=case.device, generator=g).to(case.dtype) for r in ranks]
        weights = [torch.rand(case.tokens[r], case.top_k, device=case.device, generator=g) for r in ranks]
        return cls(xs, [routing(case, r, g) for r in ranks], weights)


def poison(engines: list[CudaEngine]) -> None:
    """Rows and records of all windows become NaN; only cells keep their epochs."""
    for engine in engines:
        first, last = engine.map.starts["meta"], engine.map.starts["end"]
        engine.launcher.window.memory[first:last].fill_(255)


def dispatched(
    case: Case, engines: list[CudaEngine], streams: Ranks, inputs: Inputs, **options: Any
) -> list[CudaArrived]:
    def call(rank: int) -> CudaArrived:
        return engines[rank].dispatch(
            inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], format=case.format, scale=case.scale,
            capacity=engines[rank].worst_capacity() + case.align * case.num_experts, align=case.align, **options,
        )  # fmt: skip

    return streams.run(call)


def check_dispatch(case: Case, arrived: list[CudaArrived], inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Compare, and return the expected rows and weights of every rank."""
    expected = []
    for rank, got in enumerate(arrived):
        rows, weights, ends = reference.dispatch(
            inputs.xs, inputs.ids, inputs.weights, case.num_experts, rank, case.coded
        )
        assert torch.equal(got.moves.offsets_e, ends)
        assert torch.equal(got.rows_RD[: rows.shape[0]], rows), f"rows of rank {rank}"
        assert torch.equal(got.weights_R[: rows.shape[0]], weights), f"weights of rank {rank}"
        expected.append((rows, weights))
    return expected


def experts(rows: Tensor, scale: float = 1.5) -> Tensor:
    """Stands for the experts: other numbers than were sent, a row at a time."""
    return (rows.float() * scale + 0.25).to(rows.dtype)


def round_trip(case: Case, engines: list[CudaEngine], streams: Ranks, inputs: Inputs) -> dict[str, list[Tensor]]:
    arrived = dispatched(case, engines, streams, inputs)
    expected = check_dispatch(case, arrived, inputs)
    made, weights_R = [experts(rows) for rows, _ in expected], [weights for _, weights in expected]
    padded = [torch.full_like(got.rows_RD, float("nan")) for got in arrived]  # past the last row: must reach nothing
    for whole, rows in zip(padded, made, strict=True):
        whole[: rows.shape[0]] = rows
    wire = dict(format=case.format, scale=case.scale)

    def back(rank: int, weighted: bool, exact: bool) -> Tensor:
        weights = (inputs.weights[rank] if exact else arrived[rank].weights_R) if weighted else None
        return engines[rank].combine(padded[rank], weights, arrived[rank].moves, exact=exact, **wire)

    results = {}
    for weighted, exact in itertools.product((True, False), (False, True) if case.exact else (False,)):
        got = streams.run(lambda rank, weighted=weighted, exact=exact: back(rank, weighted, exact))
        if exact:
            want = reference.combine_exact(
                made, inputs.weights if weighted else None, inputs.ids, case.num_experts, case.decoded
            )
        else:
            all_weights = weights_R if weighted else [None] * case.world
            want = reference.combine(made, all_weights, inputs.ids, case.num_experts, case.decoded)
        for rank in range(case.world):
            assert torch.equal(got[rank], want[rank]), f"combine of rank {rank}, weighted {weighted}, exact {exact}"
        results[f"{weighted}{exact}"] = got
    for engine in engines:
        engine.launcher.check()
    return results


def setup(case: Case, **options: Any) -> tuple[list[CudaEngine], Ranks]:
    """Engines of all ranks, and what runs a function on each. Options as of virtual_engines or emulated_engines."""
    if case.device == "cpu":
        return emulated_engines(case.window, **options)
    return virtual_engines(case.window, **options), Streams(case.world)


def synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
