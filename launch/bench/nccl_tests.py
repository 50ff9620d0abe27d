"""`python -m moeweave.launch.bench.nccl_tests FOLDER ranks=N [key=value ...]`: our times beside those of nccl-tests.

FOLDER holds binaries of NVIDIA's nccl-tests (`all_reduce_perf`, ...). Each runs on N devices of this machine, then our
operations run at the same sizes and element type; both are printed side by side, with the ratio of times and of bus
bandwidths, ours over theirs. The exit code is 1 where a size from `above` bytes on differs by more than `tolerance`, or
a result was wrong.

    tolerance=0.05   how far a ratio may be from 1
    above=1048576    bytes from which on it counts: what is smaller is printed alone
    out=FOLDER       nccl_tests.json, beside moeweave-bench's own files

Other arguments are those of moeweave-bench. Operations are those with a binary (`op=` takes fewer); sizes go from 64
KiB to 1 GiB, on a CPU to 4 MiB.

How they time differs from moeweave-bench's default, so ours run with `average=true`: `iterations` launches back to back
until the devices are done, over their number. What is left of the difference: nccl-tests launch all devices from one
thread, which costs small sizes more; they take another part of their arrays at each launch where several fit (ours are
in the second-level cache if they fit there); and they allocate by ncclMemAlloc. Out-of-place all_reduce is left out, as
torch has it in place only.

To build them where there is nvcc, against the NCCL that torch installed, whose wheel lacks the name that linkers want:

    NCCL=$(python -c "import nvidia.nccl; print(nvidia.nccl.__path__[0])")
    ln -s libnccl.so.2 $NCCL/lib/libnccl.so
    git clone https://github.com/NVIDIA/nccl-tests && cd nccl-tests
    make MPI=0 CUDA_HOME=/usr/local/cuda NCCL_HOME=$NCCL NVCC_GENCODE="-gencode=arch=compute_90,code=sm_90"

The binaries are then in nccl-tests/build. They are run with that NCCL first in LD_LIBRARY_PATH, so that both use one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeweave.launch import elastic, env
from moeweave.launch.bench import program
from moeweave.launch.compose import load
from moeweave.launch.failure import RankFailed
from moeweave.launch.schema import BenchConfig, ConfigError

BINARIES = {
    "all_reduce": "all_reduce_perf",
    "all_gather": "all_gather_perf",
    "reduce_scatter": "reduce_scatter_perf",
    "all_to_all": "alltoall_perf",
    "broadcast": "broadcast_perf",
    "send_recv": "sendrecv_perf",
}
TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "half"}
IN_PLACE_ONLY = ("all_reduce", "broadcast")  # of ours: the first has a copy in it out of place
SECONDS = 900  # that a binary may take

Line = dict[str, Any]


@dataclass(frozen=True)
class Theirs:
    """Half a row of nccl-tests' table: bytes, elements, microseconds, GB/s; `wrong` is None where not checked."""

    size: int
    count: int
    in_place: bool
    time: float
    busbw: float
    wrong: int | None


@dataclass(frozen=True)
class Options:
    """What this program reads for itself; `given` goes to moeweave-bench."""

    folder: Path
    tolerance: float = 0.05
    above: int = 1 << 20
    given: list[str] = field(default_factory=list)


class BinaryFailed(RuntimeError):
    """A binary of nccl-tests ended with an error, or printed no table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 they agree, 1 they do not or something failed, 2 it cannot run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    try:
        options = read(arguments)
        binaries, config = prepare(options)
        theirs = {op: run(binary, config) for op, binary in binaries.items()}
        lines = program.measured(config)
    except (ConfigError, BinaryFailed, RankFailed) as error:
        print(f"moeweave.launch.bench.nccl_tests: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    rows = beside(lines, theirs, options)
    print(table(rows, options))
    if config.out is not None:
        _write(rows, lines[0]["context"], options, Path(config.out) / "nccl_tests.json")
    return int(any(row["off"] for row in rows) or any(line["wrong"] for line in lines))


def read(arguments: Sequence[str]) -> Options:
    """The folder, what is this program's own, and the rest. Raises ConfigError."""
    folders = [argument for argument in arguments if "=" not in argument]
    if len(folders) != 1:
        raise ConfigError(f"FOLDER: {len(folders)} were given. Name the one that holds nccl-tests' binaries.")
    values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    try:
        tolerance, above = float(values.pop("tolerance", 0.05)), int(values.pop("above", 1 << 20))
    except ValueError as error:
        raise ConfigError(
            f"tolerance and above: must be numbers ({error}). Write tolerance=0.05 above=1048576."
        ) from None
    return Options(Path(folders[0]), tolerance, above, [f"{name}={value}" for name, value in values.items()])


def prepare(options: Options) -> tuple[dict[str, Path], BenchConfig]:
    """The binaries by operation, and the config of our run. Raises ConfigError for what cannot run or be compared."""
    if env.launched_ranks() is not None:
        raise ConfigError("torchrun: this program starts ranks itself. Run it without.")
    found = {op: options.folder / name for op, name in BINARIES.items() if (options.folder / name).is_file()}
    if not found:
        raise ConfigError(
            f"{options.folder}: holds none of {', '.join(BINARIES.values())}. --help says how to build them."
        )
    names = {argument.partition("=")[0] for argument in options.given}
    on_cpu = "device=cpu" in options.given or not elastic.has_accelerator()
    usual = {"op": f"[{','.join(found)}]", "min_size": "65536", "max_size": str(1 << 22 if on_cpu else 1 << 30)}
    defaults = [f"{name}={value}" for name, value in usual.items() if name not in names]
    config = load(BenchConfig, "bench", [*defaults, "average=true", *options.given])
    if missing := [op for op in config.ops if op not in found]:
        raise ConfigError(f"op={missing[0]}: {options.folder} has no binary for it. Use {', '.join(found)}.")
    if config.graph or not config.average or config.backend is not None:
        raise ConfigError("graph, average, backend: nccl-tests' way of timing is average=true alone. Leave them out.")
    step = 16 * config.ranks  # nccl-tests cut each rank's part to a multiple of 16 bytes
    if config.min_size % step:
        least = -(-config.min_size // step) * step
        raise ConfigError(
            f"min_size={config.min_size}: must be a multiple of {step}, or nccl-tests cut it. Set {least}."
        )
    if config.max_size < options.above:
        raise ConfigError(f"above={options.above}: no size is as large. Lower it, or raise max_size.")
    program.check(config, config.ranks)
    return {op: found[op] for op in config.ops}, config


def run(binary: Path, config: BenchConfig) -> list[Theirs]:
    """Runs one binary over the config's sizes. Raises BinaryFailed."""
    options = {
        "-b": config.min_size,
        "-e": config.max_size,
        "-f": config.factor,
        "-g": config.ranks,
        "-n": config.iterations,
        "-w": config.warmup,
        "-d": TYPES[config.dtype],
        "-c": 1,
    }
    command = [str(binary.resolve()), *(str(word) for pair in options.items() for word in pair)]
    print(f"# {' '.join([binary.name, *command[1:]])}", flush=True)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, env=env.with_libraries(_nccl())
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BinaryFailed(f"{binary.name}: {error}") from error
    rows = parse(done.stdout)
    # It ends with an error where results were wrong as well, and then has told which.
    if not rows or (done.returncode and not any(row.wrong for row in rows)):
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise BinaryFailed(f"{binary.name} ended with {done.returncode}: {last}")
    return rows


def _nccl() -> list[Path]:
    """Where the NCCL of torch's wheel is, if it came as one."""
    try:
        spec = find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    return [Path(path) / "lib" for path in (spec.submodule_search_locations or ())] if spec is not None else []


def parse(text: str) -> list[Theirs]:
    """The rows of nccl-tests' table, out of place and in place, by the names in its header:

    #  size   count  type redop root  time algbw busbw #wrong  time algbw busbw #wrong
    1048576  262144 float   sum   -1 35.12 29.86 29.86      0 35.03 29.93 29.93      0
    """
    found: list[Theirs] = []
    names: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if words[:2] == ["#", "size"]:
            names = words[1:]
        elif names and words and words[0].isdigit() and len(words) == len(names):
            size, count = int(words[0]), int(words[names.index("count")])
            for in_place, at in enumerate(at for at, name in enumerate(names) if name == "time"):
                time, busbw, wrong = (words[at + names[at:].index(name)] for name in ("time", "busbw", "#wrong"))
                checked = None if wrong == "N/A" else int(float(wrong))
                found.append(Theirs(size, count, bool(in_place), float(time), float(busbw), checked))
    return found


def beside(lines: Sequence[Line], theirs: dict[str, list[Theirs]], options: Options) -> list[Line]:
    """A row for each of our lines that has another in nccl-tests' table; `off` where the two do not agree."""
    rows = []
    for line in lines:
        op, place = line["op"], line["in_place"]
        if op in IN_PLACE_ONLY and not place:
            continue
        match = [row for row in theirs[op] if (row.size, row.in_place) == (line["size"], place)]
        row = {name: line[name] for name in ("op", "size", "count", "dtype", "in_place")}
        row |= {"moeweave": {"time": line.get("median"), "busbw": line.get("busbw"), "wrong": line["wrong"]}}
        row |= {"nccl_tests": asdict(match[0]) if match else None}
        rows.append(row | _ratios(line, match[0] if match else None, options))
    return rows


def _ratios(line: Line, other: Theirs | None, options: Options) -> Line:
    if other is None or "median" not in line:
        return {"time_ratio": None, "busbw_ratio": None, "off": True}
    time, busbw = line["median"] / other.time, line["busbw"] / other.busbw if other.busbw else None
    off = abs(time - 1) > options.tolerance
    if busbw is not None:  # printed with two decimals, so that small ones are known to half a hundredth
        off |= abs(busbw - 1) > options.tolerance + 0.005 / other.busbw
    return {
        "time_ratio": time,
        "busbw_ratio": busbw,
        "off": bool(other.wrong) or (off and line["size"] >= options.above),
    }


def table(rows: Sequence[Line], options: Options) -> str:
    """Both side by side: microseconds, GB/s, and ours over theirs."""
    head = f"# {'op':>14} {'size':>12} {'type':>9} {'place':>5} {'nccl-tests us':>14} {'busbw':>8} {'moeweave us':>12}"
    out = ["#", f"{head} {'busbw':>8} {'time ratio':>10} {'busbw ratio':>11}"]
    for row in rows:
        theirs, ours = row["nccl_tests"] or {}, row["moeweave"]
        cells = [(theirs.get("time"), 14), (theirs.get("busbw"), 8), (ours["time"], 12), (ours["busbw"], 8)]
        cells += [(row["time_ratio"], 10), (row["busbw_ratio"], 11)]
        shown = " ".join(f"{'-' if value is None else format(value, '.2f'):>{width}}" for value, width in cells)
        place = "in" if row["in_place"] else "out"
        out.append(
            f"  {row['op']:>14} {row['size']:>12} {row['dtype']:>9} {place:>5} {shown}{'  OFF' if row['off'] else ''}"
        )
    counted, off = sum(row["size"] >= options.above for row in rows), sum(row["off"] for row in rows)
    out.append(
        f"# {counted} from {options.above} bytes on, {off} differ by more than {options.tolerance:.0%} or are wrong"
    )
    return "\n".join(out)


def _write(rows: Sequence[Line], context: Line, options: Options, path: Path) -> None:
    about = {name: context[name] for name in ("device_name", "ranks", "versions", "git")}
    limits = {"tolerance": options.tolerance, "above": options.above}
    path.write_text(json.dumps({**about, **limits, "rows": list(rows)}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
