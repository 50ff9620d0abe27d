"""The one-sided kernels as the compiler sees them: what they compile for, and the order of stores and signals.

The PTX is read because the order cannot be tested: a missing barrier shows once in a million rounds.
"""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest
import torch

from moeweave.kernels_ext import nvrtc, onesided
from test_nvrtc import needs_compiler

CASES = [
    (torch.bfloat16, "none", "token", 8),
    (torch.float32, "none", "token", 1),
    (torch.float16, "int8", "token", 4),
    (torch.bfloat16, "fp8", "group128", 16),
    (torch.float32, "fp8_e5m2", "token", 2),
]


def ptx_of(source: str, case: tuple[torch.dtype, str, str, int] = CASES[0]) -> str:
    return nvrtc.compile_source(source, "onesided.cu", "compute_90", dict(onesided.defines(*case))).decode()


def test_params_are_laid_out_as_in_c() -> None:
    params = onesided.params_type()
    offsets = [getattr(params, name).offset for name, _ in params._fields_]
    sizes = [ctypes.sizeof(kind) for _, kind in params._fields_]
    assert offsets == [0, *itertools.accumulate(sizes)][:-1], "a hole, which C might place elsewhere"
    assert ctypes.sizeof(params) < 4096, "what a launch can take by value"


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{case[3]}")
def test_compiles(case: tuple[torch.dtype, str, str, int]) -> None:
    ptx = ptx_of(onesided.source(), case)
    assert all(f".entry {kernel}" in ptx for kernel in onesided.THREADS)


SIGNAL = re.compile(r"\bst\.(relaxed|release)\.sys")
ROW_STORE = re.compile(r"\bst\.global\.v[24]\.u32")
# Of the block; or of the warps that close a chunk row by row, by a counter in shared memory.
BARRIER = re.compile(r"\bbar\.sync|\bbar\.red|\batom\.shared")
JUMP = re.compile(r"^(@\S+\s+)?bra(\.uni)?\s+(\S+);")


def bodies(ptx: str) -> dict[str, list[str]]:
    """Instructions and labels of every function and kernel."""
    heads = list(re.finditer(r"^(?:\.visible \.entry|\.func\s*(?:\([^)]*\))?) *(\w+)\(", ptx, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(ptx)]
    texts = {head[1]: ptx[head.end() : end] for head, end in zip(heads, ends, strict=True)}
    return {name: [line.strip() for line in text.splitlines() if line.strip()] for name, text in texts.items()}


def wrong_orders(ptx: str) -> list[str]:
    """Signals that may overtake stores: those without a fence right before them, and those that some path through the
    kernel reaches from the store of a row with no barrier between."""
    functions = bodies(ptx)
    storing = [name for name, lines in functions.items() if any(map(ROW_STORE.search, lines))]
    wrong = []
    for name, lines in functions.items():
        labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
        todo, seen = [(0, False)], set()
        while todo:
            at, unordered = todo.pop()
            if (at, unordered) in seen or at >= len(lines):
                continue
            seen.add((at, unordered))
            line, jump = lines[at], JUMP.match(lines[at])
            if SIGNAL.search(line) and (unordered or "fence.acq_rel.sys" not in lines[at - 1]):
                wrong.append(f"{name}, line {at}: {line} after {lines[at - 1]}, unordered {unordered}")
            stores = ROW_STORE.search(line) or any(line.startswith(callee) for callee in storing)
            unordered = bool(stores) or (unordered and not BARRIER.search(line))
            if jump:
                todo.append((labels[jump[3]], unordered))
            if not (jump and jump[2] and not jump[1]) and not line.startswith("ret;"):
                todo.append((at + 1, unordered))
    return wrong


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{case[3]}")
def test_signals_come_after_the_stores_they_speak_of(case: tuple[torch.dtype, str, str, int]) -> None:
    ptx = ptx_of(onesided.source(), case)
    assert len(re.findall(r"st\.relaxed\.sys\.global\.u64", ptx)) >= 5
    assert wrong_orders(ptx) == []


CHUNKS = "    const int chunks = (count + p.chunk - 1) / p.chunk;\n"


@needs_compiler
@pytest.mark.parametrize(
    "before, after",
    [(CHUNKS + "    __syncthreads();\n", CHUNKS), ("fence.acq_rel.sys;\\n\\tst.relaxed", "st.relaxed")],
    ids=["barrier", "fence"],
)
def test_the_check_sees_a_missing(before: str, after: str) -> None:
    source = onesided.source()
    assert before in source
    assert wrong_orders(ptx_of(source.replace(before, after))) != []


@needs_compiler
def test_windows_are_read_at_system_scope_and_never_as_constants() -> None:
    ptx = ptx_of(onesided.source())
    assert "ld.acquire.sys.global.u64" in ptx
    assert "ld.acquire.gpu" not in ptx
    assert ".nc." not in ptx and "ld.global.nc" not in ptx
