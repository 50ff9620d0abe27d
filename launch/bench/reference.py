"""`python -m moeweave.launch.bench.reference out=FOLDER [key=value ...]`: every figure of one machine, shape by shape.

Runs moeweave-bench once for each named shape: dispatch, combine and the layer over the dispatchers, next to the bytes
that must cross written without a collective. Decode shapes replay a CUDA graph where the device is one. Then the links
alone, what runs beside what, and the topology. All lines go to one bench.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from moeweave.launch import env
from moeweave.launch.bench import program, routed

MOE = ["op=[dispatch,combine,moe_layer,moe_layer_backward]", "backend=[alltoall,allgather]", "dtype=bfloat16"]
SIZES = ["min_size=1048576", "max_size=1073741824", "factor=16"]


def runs(on_cuda: bool) -> list[list[str]]:
    """The arguments of each run, without the user's own."""
    graph = ["graph=true"] if on_cuda else []
    found = [[*MOE, f"shape={shape}", *(graph if "decode" in shape else [])] for shape in routed.SHAPES]
    found.append(["op=[all_reduce,all_gather,reduce_scatter,all_to_all,send_recv,send_recv_both]", *SIZES])
    if on_cuda:
        found += [["op=raw", f"shape={shape}", "dtype=bfloat16", *graph] for shape in routed.SHAPES]
        found += [
            ["op=raw", "backend=push", "shape=v3-prefill", "dtype=bfloat16", f"programs={n}"] for n in (8, 16, 32, 64)
        ]
    found.append(["op=overlap", "shape=v3-prefill", "dtype=bfloat16", "max_size=268435456"])
    found.append(["op=topology", "max_size=1073741824", "dtype=bfloat16"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The worst exit code of the runs."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.startswith("out=") for argument in given):
        print("moeweave-bench reference: error: out is missing. Write out=<folder>.", file=sys.stderr)
        return 2
    if env.launched_ranks() is not None:
        print("moeweave-bench reference: error: it starts its own ranks. Run it without torchrun.", file=sys.stderr)
        return 2
    on_cuda = torch.cuda.is_available() and "device=cpu" not in given
    codes = []
    for arguments in runs(on_cuda):
        print(f"# moeweave-bench {' '.join([*arguments, *given])}", flush=True)
        codes.append(program.main([*arguments, *given]))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
