"""One rank of test_blocks_ranks.py: `blocks_rank_case.py rank world file case`, on a GPU of its own or on GPU 0.

Case "round": exchanges over both planes, eager and replayed from a graph, are what must come.
Case "layer": a three-stream layer in fixed sizes over windows has the bits of the same over collectives, replayed too.
Case "killed": the last rank kills itself between two exchanges; the others must name it within the deadline.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.blocks_cuda import Area, CudaBlocks, DeviceSignals, signals_of
from moeweave.comm.codec import Codec
from moeweave.comm.planes import new_plane_group
from moeweave.comm.streams import make_streams
from moeweave.comm.three_stream import ThreeStream
from moeweave.comm.three_stream_back import WayBack
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.comm.window_planes import WindowPlanes
from moeweave.comm.windows_cuda import SymmetricWindow
from moeweave.moe.experts import Experts, local_experts
from moeweave.moe.layer import SharedExperts
from moeweave.moe.router import Router
from rank_processes import DEADLINE, rank_main

ROWS, WIDTH, EXPERTS, TOP_K = 50, 512, 12, 4


def link_for(device: torch.device, world: int) -> CudaBlocks:
    def allocate(area: Area) -> SymmetricWindow:
        return SymmetricWindow(dist.group.WORLD, area, device)

    window = allocate(Area("signals", DeviceSignals.num_bytes(world)))
    return CudaBlocks(world, allocate, signals_of(window, DEADLINE), num_sms=32)


def exchanges(link: CudaBlocks, rank: int, world: int, rounds: int, dies: bool) -> None:
    held, blocks = torch.zeros(ROWS, WIDTH, device="cuda"), torch.zeros(world * ROWS, WIDTH, device="cuda")
    planes = {share: WindowPlanes(link, make_streams("cuda"), share) for share in (0.0, 0.3, 1.0)}

    def step(share: float) -> tuple[Tensor, ...]:
        arriving = planes[share].all_gather("rows", held), planes[share].gather_on_push("ids", held[:, :16])
        gathered, ids = (each.wait().clone() for each in arriving)
        sizes = [ROWS] * world
        return gathered, ids, planes[share].all_to_all("results", blocks, sizes, sizes, ROWS).wait().clone()

    def fill(number: int) -> tuple[Tensor, ...]:
        def value(source: int, target: int) -> Tensor:
            return (
                torch.arange(ROWS * WIDTH, device="cuda").view(ROWS, WIDTH) % 977 + 1000 * source + 7 * target + number
            )

        held.copy_(value(rank, 0))
        blocks.copy_(torch.cat([value(rank, target) for target in range(world)]))
        gathered = torch.cat([value(source, 0) for source in range(world)]).float()
        return gathered, gathered[:, :16], torch.cat([value(source, rank) for source in range(world)]).float()

    for number in range(rounds):
        if dies and number == rounds - 1 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        want, found = fill(number), step((0.0, 0.3, 1.0)[number % 3])
        torch.cuda.synchronize()
        link._signals.check()
        assert all(map(torch.equal, found, want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(0.3)
    for number in range(rounds):
        want = fill(100 + number)
        graph.replay()
        torch.cuda.synchronize()
        link._signals.check()
        assert all(map(torch.equal, found, want))


@torch.no_grad()
def layers(link: CudaBlocks, rank: int, world: int) -> None:
    torch.manual_seed(3)
    router, experts = Router(WIDTH, EXPERTS, TOP_K), Experts(WIDTH, 256, EXPERTS // world)
    made = [module.to("cuda", torch.bfloat16) for module in (router, experts, SharedExperts(WIDTH, 256))]
    groups = [new_plane_group(plane, list(range(world)), "cuda") for plane in ("push", "dma")]
    options = ThreeStreamOptions("gathered", 0.3, "prereduced", Codec.parse("fp8"), max_tokens=ROWS + 14)
    plain = ThreeStream(*groups, EXPERTS, make_streams("cuda"), replace(options, planes="collectives"), TOP_K)
    schedule = ThreeStream(*groups, EXPERTS, make_streams("cuda"), replace(options, planes="collectives"), TOP_K)
    planes = WindowPlanes(link, schedule.streams, 0.3)
    schedule.fixed_back = WayBack(planes, world, options.codec, schedule.computing)
    held = torch.randn(ROWS, WIDTH, device="cuda").bfloat16()

    def run(each: ThreeStream) -> Tensor:
        def route(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            _, weights_TK, ids_TK = made[0](x_TD)
            return ids_TK, weights_TK

        return each.layer(held, route, lambda *rows: local_experts(made[1].weights(), *rows), made[2])

    assert torch.equal(run(schedule), run(plain))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = run(schedule)
    for seed in range(5):
        torch.manual_seed(100 * rank + seed)
        held.copy_(torch.randn(ROWS, WIDTH, device="cuda"))
        want = run(plain)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y_TD, want)


def prepare(device: torch.device, world: int) -> Callable[[int, int, str], None]:
    link = link_for(device, world)

    def run(rank: int, world: int, case: str) -> None:
        if case == "layer":
            layers(link, rank, world)
        else:
            exchanges(link, rank, world, 7, dies=case == "killed")

    return run


if __name__ == "__main__":
    rank_main(prepare)
