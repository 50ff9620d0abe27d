"""Times of the one-sided CUDA kernels with virtual ranks on ONE GPU: `python tests/comm/onesided_bench.py --out FILE`.

Windows, streams and kernels of all ranks share the device: these are times of local memory, and nothing crosses a link.
They show what a change of the kernels does to their fixed cost and to the bytes they move; links are for
moeweave-bench.
A dispatch is checked against the reference before anything is timed.

    cold    256 MB are written before each replay of a graph of one operation
    warm    ten operations in one graph, a tenth of its time, nothing written between
    floor   bytes that must be read and written over the rate of a device copy

`--variants` times every way to write the kernels that `onesided.VARIANTS` leaves open, each against "default".

Legend: T tokens of a rank, K routes a token, D width, W ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from moeweave.comm.codec import wire_width
from moeweave.comm.onesided_cuda import CudaArrived, CudaEngine
from moeweave.kernels_ext.onesided import Variants
from moeweave.launch.bench.shapes import SHAPES
from onesided_cases import Case, Inputs, check_dispatch
from virtual_ranks import Streams, virtual_engines

# What each changes in onesided.VARIANTS.
CHANGES: dict[str, Variants] = {
    "default": (),
    "through the window": (("MW_EXPAND_HOME", 0), ("MW_SUM_HOME", 0), ("MW_SUM_DEPTH", 3)),
    "sum depth 3": (("MW_SUM_DEPTH", 3),),
    "expand depth 4": (("MW_EXPAND_DEPTH", 4),),
    "decode depth 8": (("MW_DECODE_DEPTH", 8),),
    "encode depth 4": (("MW_ENCODE_DEPTH", 4),),
    "streaming stores": (("MW_ROW_STORE", 1),),
    "stores leave L2 first": (("MW_ROW_STORE", 2),),
    "loads leave L2 first": (("MW_ROW_LOAD", 1),),
    "both leave L2 first": (("MW_ROW_STORE", 2), ("MW_ROW_LOAD", 1)),
}
ROUNDS, IN_GRAPH, FLUSH_BYTES = 15, 10, 256 << 20


class Setting:
    """One shape on W virtual ranks: engines, tokens, and the operations that are timed."""

    def __init__(self, shape: str, world: int, code: str, scale: str, share: bool, variants: Variants) -> None:
        sizes = SHAPES[shape]
        tokens, experts, top_k = sizes.tokens, sizes.experts, sizes.topk
        width = sizes.hidden // (world if share else 1)
        self.case = Case(
            tokens=(tokens,) * world, width=width, num_experts=experts, top_k=top_k, max_tokens=tokens, format=code,
            scale=scale,
        )  # fmt: skip
        self.engines: list[CudaEngine] = virtual_engines(self.case.window, variants=variants)
        self.streams, self.inputs = Streams(world), Inputs.of(self.case)
        spread = torch.bincount(torch.cat(self.inputs.ids).reshape(-1), minlength=experts).view(world, -1).sum(1)
        self.capacity = int(spread.max())
        self.arrived = self.dispatch()
        torch.cuda.synchronize()
        if code == "none" or tokens < 1000:  # the reference encodes on the CPU
            check_dispatch(self.case, self.arrived, self.inputs)

    def dispatch(self) -> list[CudaArrived]:
        wire, inputs = dict(format=self.case.format, scale=self.case.scale), self.inputs

        def call(rank: int) -> CudaArrived:
            given = inputs.xs[rank], inputs.ids[rank], inputs.weights[rank]
            return self.engines[rank].dispatch(*given, capacity=self.capacity, **wire)

        return self.streams.run(call)

    def combine(self) -> list[Tensor]:
        wire, arrived = dict(format=self.case.format, scale=self.case.scale), self.arrived
        return self.streams.run(
            lambda r: self.engines[r].combine(arrived[r].rows_RD, arrived[r].weights_R, arrived[r].moves, **wire)
        )

    def num_bytes(self) -> dict[str, int]:
        """Least traffic of device memory of all ranks: rows read at home, stored to and read from windows, written."""
        case, world = self.case, self.case.world
        row, wire = case.width * 2, wire_width(case.format, case.scale, case.width, case.dtype)
        local = case.num_experts // world
        sent = sum(int(torch.zeros(len(ids), world, device="cuda").scatter_(1, ids // local, 1).sum())
                   for ids in self.inputs.ids)  # fmt: skip
        tokens, routes = sum(case.tokens), sum(case.tokens) * case.top_k
        return {"dispatch": tokens * row + 2 * sent * wire + routes * row,
                "combine": routes * row + 2 * sent * wire + tokens * row}  # fmt: skip


def captured(call: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


def median_us(run: Callable[[], object], flush: Tensor | None = None) -> float:
    found = []
    for _ in range(ROUNDS + 3):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush.zero_()
        before.record()
        run()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after) * 1e3)
    return statistics.median(found[3:])


def copy_rate() -> float:
    """Bytes a microsecond, read plus written."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_us(lambda: target.copy_(source))


def measure(shape: str, world: int, codec: str, change: str, rate: float, share: bool) -> dict[str, Any]:
    code, _, scale = codec.partition("-")
    setting = Setting(shape, world, code, scale or "token", share, CHANGES[change])
    flush, num_bytes = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"), setting.num_bytes()
    budget = setting.engines[0].launcher.budget
    line: dict[str, Any] = dict(
        shape=shape, width=setting.case.width, ranks=world, codec=codec, change=change,
        blocks_a_rank=f"{budget.senders}+{budget.receivers}",
    )  # fmt: skip
    for name, call in (("dispatch", setting.dispatch), ("combine", setting.combine)):
        once, many = captured(call, 1), captured(call, IN_GRAPH)
        cold, warm = median_us(once.replay, flush), median_us(many.replay) / IN_GRAPH
        floor = num_bytes[name] / rate
        line[name] = dict(cold_us=round(cold, 1), warm_us=round(warm, 1), floor_us=round(floor, 1))
    for engine in setting.engines:
        engine.launcher.check()
    print(json.dumps(line), flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--ranks", default="1,4")
    parser.add_argument("--codecs", default="none,fp8")
    parser.add_argument("--share", action="store_true", help="width over ranks: a rank's part of the device's rate")
    parser.add_argument("--variants", action="store_true", help="all of CHANGES, in place of the default alone")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rate = copy_rate()
    settings = [(shape, int(world), codec, change) for shape in given.shapes.split(",")
                for world in given.ranks.split(",") for codec in given.codecs.split(",")
                for change in (CHANGES if given.variants else ["default"])]  # fmt: skip
    lines = [measure(*setting, rate, given.share) for setting in settings]
    if given.out:
        device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        given.out.write_text(
            json.dumps(dict(device=device, copy_tb_s=round(rate / 1e6, 3), rows=lines), indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
