"""One rank of test_onesided_ranks.py: `onesided_rank_case.py rank world file case`, on a GPU of its own or on GPU 0.

Case "round": a layer's dispatch and combine through windows of torch's symmetric memory, checked against the reference.
Case "killed": the last rank kills itself between two dispatches; the others must name it within the deadline.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist

from moeweave.comm.engines_cuda import open_engine
from moeweave.comm.onesided_cuda import CudaEngine
from moeweave.comm.onesided_launch import Budget
from moeweave.comm.windows_cuda import SymmetricWindow, WindowMap
from moeweave.kernels_ext.onesided import reference
from rank_processes import DEADLINE, rank_main

TOKENS, WIDTH, EXPERTS, TOP_K = 50, 512, 12, 4


def engine_for(device: torch.device, world: int) -> CudaEngine:
    row = WIDTH * 2
    window_map = WindowMap(
        size=world, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS, row_bytes=row, back_bytes=row
    )
    window = SymmetricWindow(dist.group.WORLD, window_map, device)
    return open_engine(window, window_map, timeout=DEADLINE, budget=Budget(32, 32))


def round_trips(engine: CudaEngine, rank: int, world: int, rounds: int, dies: bool) -> None:
    g = torch.Generator("cuda").manual_seed(5)
    xs = [torch.randn(TOKENS, WIDTH, device="cuda", generator=g).bfloat16() for _ in range(world)]
    ids = [torch.rand(TOKENS, EXPERTS, device="cuda", generator=g).topk(TOP_K).indices for _ in range(world)]
    weights = [torch.rand(TOKENS, TOP_K, device="cuda", generator=g) for _ in range(world)]
    expected = [reference.dispatch(xs, ids, weights, EXPERTS, each) for each in range(world)]
    want = reference.combine([e[0] for e in expected], [e[1] for e in expected], ids, EXPERTS)
    for number in range(rounds):
        if dies and number == rounds - 1 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        arrived = engine.dispatch(xs[rank], ids[rank], weights[rank], capacity=None if number % 2 else 1000)
        y = engine.combine(arrived.rows_RD, arrived.weights_R, arrived.moves)
        torch.cuda.synchronize()
        engine.launcher.check()
        rows = expected[rank][0]
        assert torch.equal(arrived.rows_RD[: len(rows)], rows)
        assert torch.equal(y, want[rank])


def prepare(device: torch.device, world: int) -> Callable[[int, int, str], None]:
    engine = engine_for(device, world)
    return lambda rank, world, case: round_trips(engine, rank, world, 6, dies=case == "killed")


if __name__ == "__main__":
    rank_main(prepare)
