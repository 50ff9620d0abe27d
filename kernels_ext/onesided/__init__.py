"""One-sided dispatch and combine for NVIDIA GPUs: kernels that write rows straight into peers' windows.

What each kernel does is in `csrc/`, one file an idea, in the order of `SOURCES`; together they are one source without
headers, compiled at first use (`nvrtc.py`) for a dtype, a codec, a scale group and a top-k. `Params` is the one
structure that every kernel takes. Who allocates windows and calls the kernels is `comm/onesided_cuda.py`.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import torch

from moeweave.kernels_ext import nvrtc

SOURCES = ("ptx.cu", "link.cu", "rows.cu", "layout.cu", "send.cu", "dispatch.cu", "combine.cu", "small.cu")
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
CODECS = {"none": 0, "int8": 1, "fp8": 2, "fp8_e5m2": 3}
GROUPS = {"token": 0, "group128": 128}
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Threads of a block, as the kernels' launch bounds have it: with more, rows in flight do not fit the registers.
THREADS = {"moeweave_dispatch": 384, "moeweave_combine": 384, "moeweave_weight_gradients": 512, "moeweave_plan": 512}
MAX_RANKS, MAX_TOP_K, MAX_CHUNK = 64, 16, 32
KEPT_BYTES = 96 << 10  # of shared memory, for each of two blocks of a multiprocessor: sums before they are encoded
# As in link.cu: blocks of a role, where the epochs start in a rank's state, kinds of operation (of two roles each).
MAX_BLOCKS, EPOCHS, KINDS = 512, 8, 3
STATE_WORDS = EPOCHS + (2 * KINDS + 1) * MAX_BLOCKS

# Enumerations of link.cu.
CACHED, RAW, GRADIENT, EXACT, WEIGHTED = 1, 2, 4, 8, 16
OPERATIONS = ("dispatch", "combine", "plan")
WAITS = {1: "acknowledgement of the round before", 2: "counts of routes", 3: "rows", 4: "gradients of the weights"}
_C_TYPES = {"u64": ctypes.c_uint64, "i64": ctypes.c_int64, "int": ctypes.c_int32}

Variants = tuple[tuple[str, int], ...]
# Ways to write the kernels that only a measurement decides between; the results are the same, bit for bit.
VARIANTS: Variants = (
    ("MW_EXPAND_HOME", 1),  # dispatch: rows to this rank's own experts are read where the tokens are, without a codec
    ("MW_SUM_HOME", 1),  # prereduced combine: rows of its own experts are summed where the result is, without a codec
    # Units (16 bytes of the model's dtype) of a row that a lane loads before it uses one.
    ("MW_EXPAND_DEPTH", 8),  # of dispatch, rows that are stored as they came
    ("MW_DECODE_DEPTH", 4),  # coded rows, where they are received
    ("MW_ENCODE_DEPTH", 1),  # and where they are sent; 4 spill registers
    ("MW_SUM_DEPTH", 2),  # of combine, two rows each, without a codec; 3 spill registers
    ("MW_ROW_STORE", 0),  # expert-major rows are stored 0 plainly, 1 streaming (.cs), 2 first to leave L2
    ("MW_ROW_LOAD", 0),  # rows that are read for the last time are loaded 0 plainly, 1 first to leave L2
)


@functools.cache
def source(names: tuple[str, ...] = SOURCES) -> str:
    """Files of `csrc/` as one text, in their order."""
    folder = Path(__file__).parent / "csrc"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _fields() -> list[tuple[str, type]]:
    """Fields of `struct Params`, read from link.cu: there is one list of them."""
    text = (Path(__file__).parent / "csrc" / "link.cu").read_text(encoding="utf-8")
    match = re.search(r"struct Params \{(.*?)\};", text, re.DOTALL)
    assert match, "link.cu has no struct Params"
    statements = re.sub(r"//[^\n]*", "", match[1]).split(";")
    typed = [statement.split(None, 1) for statement in statements if statement.strip()]
    return [(name.strip(), _C_TYPES[kind]) for kind, names in typed for name in names.split(",")]


@functools.cache
def params_type() -> type[ctypes.Structure]:
    """ctypes twin of `struct Params`."""
    return type("Params", (ctypes.Structure,), {"_fields_": _fields()})


def defines(
    dtype: torch.dtype, codec: str, scale: str, top_k: int, variants: Variants = ()
) -> tuple[tuple[str, int], ...]:
    """What the source is compiled for. `variants` go before those of VARIANTS."""
    group = GROUPS[scale] if codec != "none" else 0
    rows = ("MW_DTYPE", DTYPES[dtype]), ("MW_CODEC", CODECS[codec]), ("MW_GROUP", group), ("MW_TOPK", top_k)
    return *rows, *(dict(VARIANTS) | dict(variants)).items()


def kernels(
    dtype: torch.dtype, codec: str, scale: str, top_k: int, device: int, variants: Variants = ()
) -> nvrtc.Module:
    """The kernels for rows of `dtype` that travel as `codec` and `scale` of comm/codec.py say."""
    return nvrtc.load(source(), "onesided.cu", tuple(THREADS), defines(dtype, codec, scale, top_k, variants), device)


def supports(device: torch.device) -> str | None:
    """None, or why the kernels cannot run on this device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"needs an NVIDIA GPU, not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"needs compute capability 9.0 or newer, this GPU has {'.'.join(map(str, capability))}"
    try:
        nvrtc.compiler()
    except OSError as error:
        return str(error)
    return None
