"""Ranks as processes of their own, which no agent watches: it would end the survivors of a killed one first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from moeweave.comm.kernel_reports import OneSidedError

DEADLINE = 10.0  # seconds that a kernel waits in these programs


def check_done(ranks: list[tuple[int, str]]) -> None:
    """All ranks of `outputs_of` went through."""
    for code, output in ranks:
        assert code == 0, output
        assert "done" in output


def check_survivors(ranks: list[tuple[int, str]], what: str) -> None:
    """The last of `outputs_of` was killed; the others named it in time: `what` is what waited, as a pattern."""
    *survivors, (code, output) = ranks
    assert code == -9, output
    pattern = rf"([\d.]+) s: {what} waited {DEADLINE:g} s .* of rank {len(survivors)}"
    for code, output in survivors:
        assert code == 3, output
        found = re.search(pattern, output)
        assert found, output
        assert float(found[1]) < 2.5 * DEADLINE


def outputs_of(program: Path, case: str, world: int, folder: Path) -> list[tuple[int, str]]:
    """Exit code and output of every rank of `program rank world file case`."""
    root = str(program.parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(world), str(folder / "store"), case],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def rank_main(prepare: Callable[[torch.device, int], Callable[[int, int, str], None]]) -> None:
    """What such a program does: `rank world file case` -> a group, then `prepare(device, world)(rank, world, case)`.

    A OneSidedError ends it with code 3, after the seconds since all was prepared and the error's text.
    """
    rank, world, file, case = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    alone = torch.cuda.device_count() < world
    if alone:  # several ranks on one GPU: only the link is missing
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(0 if alone else rank)
    backend = "gloo" if alone else "cuda:nccl,cpu:gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=world)
    run, start = prepare(torch.device("cuda", torch.cuda.current_device()), world), time.monotonic()
    try:
        run(rank, world, case)
    except OneSidedError as error:
        print(f"{time.monotonic() - start:.1f} s: {error}", flush=True)
        os._exit(3)  # the groups of a dead rank cannot be taken down in order
    print("done", flush=True)
    dist.barrier()
    dist.destroy_process_group()
