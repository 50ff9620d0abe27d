"""`python -m moeweave.launch.compare models`: a whole model on many meshes, beside transformers' own EP.

Training steps (forward, backward, AdamW) or prefill (prompts into a new cache) of a model of real sizes with fewer
layers. All methods have the same weights, tokens a rank and recomputation; parameters, gradients and Adam's moments are
in --dtype. The first pass is checked: loss and global gradient norm (prefill: the last logits) must be those of the
first method.

Each method runs in ranks of its own, one after the other, so that all have the whole memory and one that fails takes
nothing down. The first of transformers' meshes runs again at the end: what that pair differs by (A/A) is what clocks,
memory and processes alone give. A figure is the median over passes of the slowest rank. The file is written after each
method.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from moeweave.launch import elastic, runlog
from moeweave.launch.compare import figures
from moeweave.launch.compare.files import file_of_figures, file_to_write
from moeweave.launch.compare.methods import RIVAL, Method, check, defaults, parse
from moeweave.launch.compare.on_ranks import Job, rank_main
from moeweave.launch.failure import RankFailed
from moeweave.launch.schema import ConfigError
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.footprint import footprint
from moeweave.parallel.hf import rival
from moeweave.parallel.hf.build import build_model
from moeweave.parallel.parallelize import top_k_of

MODELS = Path(__file__).parents[2] / "configs" / "model"
PROGRAM = "python -m moeweave.launch.compare models"
EXAMPLES = f"""examples:
  {PROGRAM} --ranks 4 --out train.json
      Qwen3-30B-A3B with 12 layers, 2 sequences of 4096 a rank, the meshes kept for 4 ranks
  {PROGRAM} --ranks 2 --what prefill --layers 8 --out prefill.json
      prompts into a cache, with overlap and without
  {PROGRAM} --ranks 4 --methods dp4ep4 dp4ep4:overlap=microbatch dp2tp2ep4 --rivals dp4ep4 dp4ep2
      these alone; transformers on two meshes
  {PROGRAM} --ranks 2 --device cpu --model qwen3_moe_small --layers 2 --seq-length 256 --dtype float32
      a small one on CPU ranks
  {PROGRAM} --show train.json
      the table of a file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 no method ran, 2 the arguments cannot run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    if args.show:
        print(figures.markdown(args.show))
        return 0
    try:
        job, methods = _job(args), _methods(args)
        token_flops = _flops(job)
        result = _about(args, job, arguments)
    except ConfigError as error:
        print(f"compare models: error: {error}", file=sys.stderr)
        return 2
    tokens = job.sequences * job.seq_length
    started, longest = time.monotonic(), 0.0
    for at, method in enumerate(methods):
        begun = time.monotonic()
        again = any(row["name"] == method.name for row in result["methods"])
        row = {"name": method.name + (figures.AGAIN if again else "")}
        if method.rival and (reason := rival.why_not()):
            row["reason"] = reason
        elif at + 1 < len(methods) and begun - started + 2 * longest > args.within:
            row["reason"] = f"left out: --within {args.within} seconds has no room for it"
        else:
            row |= _run(method, job, args)
            longest = max(longest, time.monotonic() - begun)
        result["methods"].append(row)
        figures.complete(result["methods"], tokens, token_flops, job.dtype)
        _tell(row, at, len(methods), time.monotonic() - begun)
        _write(result, args.out)
    print(figures.markdown(result))
    return int(all("reason" in row for row in result["methods"]))


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes, one a device (default: 2)")
    add("--what", choices=("train", "prefill"), default="train", help="what a pass is (default: train)")
    add("--model", default="qwen3_30b_a3b", help="a file of configs/model (default: qwen3_30b_a3b)")
    add("--layers", type=int, default=12, help="of the model's layers (default: 12)")
    add("--seq-length", type=int, default=4096, help="positions of a sequence (default: 4096)")
    add("--sequences", type=int, default=2, help="a rank and pass (default: 2)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of everything (default: bfloat16)")
    add("--no-recompute", action="store_true", help="keep activations instead of computing them again")
    add("--methods", nargs="+", metavar="WORD", help="meshes and plans, such as dp4ep4:overlap=microbatch")
    add(
        "--rivals",
        nargs="*",
        metavar="MESH",
        help="transformers' meshes (default: all ranks as dp and ep); may be none",
    )
    add("--warmup", type=int, default=3, help="passes before the timed ones (default: 3)")
    add("--steps", type=int, default=10, help="timed passes (default: 10)")
    add("--within", type=int, default=450, help="seconds in which all should be done (default: 450)")
    add("--limit", type=int, default=150, help="seconds after which a method is given up (default: 150)")
    add("--device", choices=("cpu",), help="CPU ranks also beside accelerators")
    add("--out", type=file_to_write, help="write all figures here as JSON")
    add("--sha", help="commit, where the measuring machine has no git")
    add(
        "--show",
        type=file_of_figures,
        metavar="FILE",
        help="print the Markdown table of such a file, and measure nothing",
    )
    return parser


def _job(args: argparse.Namespace) -> Job:
    path = MODELS / f"{args.model}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in MODELS.glob("*.yaml")))
        raise ConfigError(f"--model {args.model}: must be one of {known}.")
    model = yaml.safe_load(path.read_text())
    for name, least in (("layers", 1), ("seq_length", 2), ("sequences", 1), ("warmup", 1), ("steps", 1), ("ranks", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}.")
    return Job(
        what=args.what,
        source=model["source"],
        overrides={**model["overrides"], "num_hidden_layers": args.layers},
        dtype=args.dtype,
        device=args.device,
        sequences=args.sequences,
        seq_length=args.seq_length,
        warmup=args.warmup,
        steps=args.steps,
        recompute=not args.no_recompute,
        limit=args.limit,
    )


def _methods(args: argparse.Namespace) -> list[Method]:
    """Transformers' first mesh, ours, transformers' others, and its first again; all checked."""
    whole = f"dp{args.ranks}ep{args.ranks}"
    rivals = [parse(RIVAL + word) for word in ([whole] if args.rivals is None else args.rivals)]
    ours = [parse(word) for word in args.methods or defaults(args.ranks, args.what)]
    methods = [*rivals[:1], *ours, *rivals[1:], *rivals[:1]]
    for method in methods:
        check(method, args.ranks, args.what)
    if args.device is None and elastic.has_accelerator() and args.ranks > torch.accelerator.device_count():
        raise ConfigError(f"--ranks {args.ranks}: this machine has {torch.accelerator.device_count()} devices.")
    return methods


def _flops(job: Job) -> float:
    """What a token needs; the model is only described."""
    config = job.config()
    model = build_model(job.source, job.overrides, size="given", device="meta")
    found = footprint(model, find_moe_blocks(model), top_k_of(model))
    return figures.flops_of_token(found, config, job.seq_length, job.what)


def _about(args: argparse.Namespace, job: Job, arguments: list[str]) -> dict[str, Any]:
    about = runlog.provenance()
    about["host"] = about.pop("device")
    if args.sha is not None:
        about["git"] = {"sha": args.sha}
    if torch.version.cuda and args.device is None:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        about["versions"] |= {"cuda": str(torch.version.cuda), "nccl": nccl}
    shown = {"model": args.model, "layers": args.layers, "ranks": args.ranks, **asdict(job)}
    return {**shown, "command": f"{PROGRAM} {shlex.join(arguments)}", **about, "methods": []}


def _run(method: Method, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Its figures, or the reason why there are none."""
    on_cpu = args.device == "cpu" or not elastic.has_accelerator()
    logs = Path(tempfile.mkdtemp(prefix="compare-"))
    try:
        found: dict[str, Any] = elastic.start_ranks(
            rank_main, method, job, num_ranks=args.ranks, log_dir=logs, on_cpu=on_cpu
        )
    except RankFailed as error:  # the logs stay: the error names a file in them
        print(error, file=sys.stderr)
        return {"reason": error.failure.message.splitlines()[0][:300]}
    shutil.rmtree(logs)
    return found


def _tell(row: dict[str, Any], at: int, count: int, seconds: float) -> None:
    said = row.get("reason") or f"{row['tokens_per_second']:,.0f} tokens/s a rank"
    print(f"{at + 1}/{count} {row['name']}: {said} ({seconds:.0f} s)", flush=True)


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(out)
