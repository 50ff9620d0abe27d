"""Runs a function on n ranks: values back in rank order, every rank's traceback shown when one fails.

A pool of rank processes per world size is forked from a server that has already imported torch (and transformers,
where it is installed): the imports cost seconds and hundreds of MB a process, a fork some 20 MB. The pool is reused by
every case; each case gets a fresh gloo world over one shared file, and the same seeds. A rank that raises, dies or
overruns the time limit costs its whole pool, because its peers may wait in a collective for ever; the next case forks
another. Ranks leave as soon as the pipe to the test process closes, so killing the tests leaves nothing behind.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import pickle
import queue
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What ranks would otherwise import one by one; a module that is not installed is passed over.
PRELOAD = [
    "pytest",
    "numpy",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "torch.distributed.pipelining",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.mixtral.modeling_mixtral",
    "peft",
    "moeweave",
]
# Read when the server starts. One thread per rank, and none before the fork; gloo on the loopback needs no name server.
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else `torch.cuda.is_available()` in the server spoils CUDA in every fork
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
}
GRACE_SECONDS = 1.5  # how long the other ranks may take to report, once one has failed
# A rank of a fresh pool has about a dozen threads, and each group some more.
MAX_THREADS = 100


class RankError(RuntimeError):
    """A rank raised or died. `rank` failed first; `reports[rank]` is what is known of each rank that did not finish."""

    def __init__(self, headline: str, rank: int, reports: dict[int, str]):
        self.rank, self.reports = rank, reports
        super().__init__("\n".join([headline, *(f"--- rank {r}: {text.strip()}" for r, text in reports.items())]))


class RankTimeout(RankError):
    """The ranks did not finish in time; the reports say where each one was."""


def run_ranks(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, fresh: bool = False) -> list[Any]:
    """Calls `fn(*args)` on `n` ranks of a gloo world and returns what each rank returned, in rank order.

    `fn` is a module-level function; arguments and values are pickled (tensors by value). Raises RankError when a rank
    raises or dies, RankTimeout after `timeout` seconds. `fresh=True` forks ranks for this case alone, for code that
    leaves state in its process which the next case must not meet.
    """
    try:
        call = pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"run_ranks: fn {fn!r} or its arguments cannot be sent to another process ({error}). "
            "Pass a function defined at module level, and arguments that pickle."
        ) from error
    pool = _pools.pop(n, None) if not fresh else None
    pool = pool or _Pool(n)
    try:
        values = pool.run(call, timeout)
    except BaseException:
        pool.kill()
        raise
    if fresh or pool.has_leaked():
        pool.kill()
    else:
        _pools[n] = pool  # back only now: a case that starts ranks of its own meanwhile gets others
    return values


def close_pools() -> None:
    """Ends every rank. The server they were forked from ends with this process."""
    while _pools:
        _pools.popitem()[1].kill()


atexit.register(close_pools)


# ---- the test process's side


class _Pool:
    """n rank processes, each at the end of a pipe."""

    def __init__(self, n: int):
        _start_server()
        self.folder = tempfile.mkdtemp(prefix="ranks-")
        self.cases = 0
        self.processes, self.pipes = [], []
        context = multiprocessing.get_context("forkserver")
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(theirs, rank, n, self.folder), name=f"rank {rank}")
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, call: bytes, timeout: float) -> list[Any]:
        """One case on every rank; the values in rank order."""
        self.cases += 1
        for pipe in self.pipes:
            pipe.send((self.cases, list(sys.path), os.getcwd(), call))
        values, failures = self._collect(range(len(self.pipes)), time.monotonic() + timeout, stop_at_failure=True)
        if failures:
            missing = set(range(len(self.pipes))) - set(values) - {f.rank for f in failures}
            values_late, more = self._collect(missing, time.monotonic() + GRACE_SECONDS)
            blocked = missing - set(values_late) - {f.rank for f in more}
            raise self._error(failures + more, blocked)
        blocked = set(range(len(self.pipes))) - set(values)
        if blocked:
            where = self._stacks(blocked)
            raise RankTimeout(f"ranks {sorted(blocked)} did not finish in {timeout:g} s", min(blocked), where)
        return [values[rank] for rank in range(len(self.pipes))]

    def has_leaked(self) -> bool:
        """True once groups of past cases, kept alive somewhere, have left so many gloo threads that they slow all."""
        tasks = Path("/proc", str(self.processes[0].pid), "task")
        return tasks.is_dir() and sum(1 for _ in tasks.iterdir()) > MAX_THREADS

    def _collect(
        self, ranks: Iterable[int], deadline: float, stop_at_failure: bool = False
    ) -> tuple[dict[int, Any], list[_Failure]]:
        """Answers of `ranks` until all have come, the deadline is past, or (if asked) one is a failure."""
        waiting = {self.pipes[rank]: rank for rank in ranks}
        values: dict[int, Any] = {}
        failures: list[_Failure] = []
        while waiting and not (stop_at_failure and failures):
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, when, payload = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    failures.append(self._death(rank))
                    continue
                if ok:
                    values[rank] = payload
                else:
                    failures.append(_Failure(rank, when, *payload))
        return values, failures

    def _death(self, rank: int) -> _Failure:
        self.processes[rank].join(5)
        code = self.processes[rank].exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        # A death sorts before every traceback: what the peers then raise is that their connection closed.
        return _Failure(rank, 0.0, f"the process died ({how})", f"the process died ({how})")

    def _error(self, failures: list[_Failure], blocked: set[int]) -> RankError:
        failures = sorted(failures, key=lambda failure: failure.when)
        first = failures[0]
        reports = {failure.rank: failure.report for failure in failures} | self._stacks(blocked)
        return RankError(f"rank {first.rank} of {len(self.pipes)} failed: {first.headline}", first.rank, reports)

    def _stacks(self, ranks: set[int]) -> dict[int, str]:
        """Where each of these ranks is, as it says itself on SIGUSR1."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2 if ranks else 0)
        return {
            rank: "still running, stopped here:\n" + Path(self.folder, f"stack-{rank}").read_text()
            for rank in sorted(ranks)
        }

    def kill(self) -> None:
        """Ends the ranks and whatever they started, and waits until they are gone."""
        for process in self.processes:
            if process.is_alive():
                _kill_group(process.pid)
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join(10)
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _Failure:
    rank: int
    when: float  # monotonic seconds, one clock for all processes of the machine
    headline: str
    report: str


_pools: dict[int, _Pool] = {}


def _start_server() -> None:
    """Starts the process that ranks are forked from, unless it runs."""
    kept = dict(os.environ)
    os.environ.update(SERVER_ENVIRONMENT, PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path))
    try:
        forkserver.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a rank that has only just started has no group of its own yet
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


# ---- the ranks' side


def _rank_main(pipe: connection.Connection, rank: int, size: int, folder: str) -> None:
    """Serves cases until the pipe closes."""
    os.setpgid(0, 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    stack_file = Path(folder, f"stack-{rank}").open("w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, stack_file, all_threads=False)
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), size)
    cases: queue.Queue[tuple[int, list[str], str, bytes]] = queue.Queue()
    threading.Thread(target=_read_cases, args=(pipe, cases, folder), daemon=True).start()
    gc.freeze()
    while True:
        case, path, cwd, call = cases.get()
        try:
            sys.path[:] = path
            os.chdir(cwd)
            _forget_last_case()
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"case{case}", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(minutes=30),
            )
            fn, args = pickle.loads(call)
            answer = pickle.dumps((True, time.monotonic(), fn(*args)))
        except BaseException as error:
            headline = traceback.format_exception_only(type(error), error)[-1].strip()
            answer = pickle.dumps((False, time.monotonic(), (headline, traceback.format_exc())))
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(answer)


def _read_cases(pipe: connection.Connection, cases: queue.Queue, folder: str) -> None:
    """Takes cases off the pipe; at its end ends the process, even one that is blocked in a collective."""
    try:
        while True:
            cases.put(pipe.recv())
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        _kill_group(os.getpid())


def _forget_last_case() -> None:
    """Back to a state that does not depend on which cases ran before. Every rank has finished the last one by now."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    # Cached placements and compiled code hold meshes of groups that are gone.
    sys.modules["torch.distributed.tensor.debug"]._clear_sharding_prop_cache()
    sys.modules["torch.distributed.tensor._random"]._rng_tracker = None
    sys.modules["torch._dynamo"].reset()
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    seed_everything()


def seed_everything() -> None:
    """The seeds that every case starts from, in the test process and in ranks."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
