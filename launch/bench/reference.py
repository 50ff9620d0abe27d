"""`python -m moeweave.launch.bench.reference out=FOLDER [key=value ...]`: every figure of one machine, shape by shape.

What moeweave-bench gives for each named shape, on the same ranks: dispatch, combine and the layer over the
dispatchers, next to the bytes that must cross written without a collective. Decode shapes replay a CUDA graph where
the device has such. Then the links alone, what runs beside what, and the topology. All lines go to one bench.jsonl in
FOLDER, as each run ends. Arguments replace those of the runs; `backend` those of the MoE operations alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from moeweave.launch import env
from moeweave.launch.bench import program, routed, shapes
from moeweave.launch.compose import load
from moeweave.launch.schema import BenchConfig, ConfigError

MOE = f"op=[{','.join(routed.OPS)}]"
LINKS = "op=[all_reduce,all_gather,reduce_scatter,all_to_all,send_recv,send_recv_both]"


def runs(on_cuda: bool) -> list[list[str]]:
    """The arguments of each run, without the user's own."""
    most = 1 << 30 if on_cuda else 1 << 22
    bf16, graph = "dtype=bfloat16", ["graph=true"] if on_cuda else []
    fused = ",onesided_static,onesided_static_exact" if on_cuda else ",onesided"
    found = [
        [MOE, f"backend=[alltoall,allgather{fused}]", bf16, f"shape={shape}", *(graph if "decode" in shape else [])]
        for shape in shapes.SHAPES
    ]
    found += [["op=raw", bf16, f"shape={shape}", *graph] for shape in shapes.SHAPES]
    if on_cuda:
        coded = ["op=dispatch", "backend=onesided_static", "codec=[none,fp8,int8]", bf16]
        found += [[*coded, f"shape={shape}", *(graph if "decode" in shape else [])] for shape in shapes.SHAPES]
        found += [["op=raw", "backend=push", bf16, "shape=v3-prefill", f"programs={n}"] for n in (8, 16, 32, 64)]
        swept = ["op=[dispatch,combine]", "backend=onesided_static", "num_sms=[4,8,12,16,24,32,48,64,96]", *graph]
        found.append([*swept, bf16, "shape=v3-prefill"])
    found.append([LINKS, "min_size=1048576", f"max_size={most}", "factor=16"])
    found.append(["op=overlap", bf16, "shape=v3-prefill", f"max_size={most // 4}"])
    found.append(["op=topology", bf16, f"max_size={most}"])
    return found


def merged(arguments: Sequence[str], given: Sequence[str]) -> list[str]:
    """A run's arguments with the user's in place of those of the same name."""
    names = {argument.partition("=")[0] for argument in given}
    if arguments[0] != MOE:
        given = [argument for argument in given if not argument.startswith("backend=")]
        names -= {"backend"}
    return [argument for argument in arguments if argument.partition("=")[0] not in names] + list(given)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the worst exit code of the runs, 2 where the arguments cannot run."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "-h" in given or "--help" in given:
        print(__doc__)
        return 0
    values = dict(argument.partition("=")[::2] for argument in given)
    if not values.get("out"):
        return _refuse("out is missing. Write out=<folder>.")
    if "topology" not in values:
        given.append(f"topology={values['out']}/topology.json")
    if env.launched_ranks() is not None:
        return _refuse("it starts ranks itself. Run it without torchrun.")
    on_cuda = torch.cuda.is_available() and values.get("device", "cuda") == "cuda"
    try:
        configs = [load(BenchConfig, "bench", merged(arguments, given)) for arguments in runs(on_cuda)]
        return program.start(*configs)
    except ConfigError as error:
        return _refuse(str(error))


def _refuse(text: str) -> int:
    print(f"moeweave.launch.bench.reference: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
