"""Starts ranks on this machine with torch elastic, and ends them all when one fails.

On the CPU ranks are forked: the parent has imported torch and transformers to check the config, and a fork spares each
rank those seconds. Beside accelerators, whose drivers do not survive a fork, they are spawned.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moeweave.launch import env, failure, rank, rendezvous, stopping, watch
from moeweave.launch.schema import ConfigError


def start_ranks(
    fn: Callable[..., Any], *args: Any, num_ranks: int, log_dir: Path, max_restarts: int = 0, on_cpu: bool = True
) -> Any:
    """Runs `fn(*args)` on `num_ranks` ranks of this machine and returns rank 0's value.

    `fn` is a module-level function; it finds RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous in its environment, as
    under torchrun. Rank 0 keeps the terminal, the others write to `log_dir`. When a rank fails the others are stopped
    within seconds; one that hangs is found by its beats (watch.py). Raises RankFailed with the first failure,
    HostFailed where there was no room to write one down, and Stopped (a KeyboardInterrupt) on ctrl-C, or after SIGTERM
    and what the ranks do then.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    meeting, rounds = rendezvous.settings()
    watched = watch.Watch(log_dir)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=secrets.token_hex(16),
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs=meeting,
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        start_method="fork" if on_cpu and sys.platform == "linux" else "spawn",
        logs_specs=RankLogs(log_dir, rounds, watched),
    )
    env.use_a_store_per_restart()
    env.use_interface("lo" if sys.platform == "linux" else None)
    threads = env.threads_asked() or max(1, _num_cores() // num_ranks)
    try:
        with quiet_elastic(), watch.watching(watched):
            return elastic_launch(config, _rank)(fn, args, str(log_dir), os.getpid(), threads)[0]
    except ChildFailedError as error:
        codes = {rank: process.exitcode for rank, process in error.failures.items()}
        if set(codes.values()) == {stopping.EXIT_CODE}:  # somebody asked the ranks themselves
            raise failure.Stopped("the ranks were stopped by SIGTERM", stopping.EXIT_CODE) from None
        raise failure.RankFailed(failure.first(log_dir, num_ranks, codes)) from None
    except json.JSONDecodeError:  # torch's own record of the failure is empty
        message = f"a rank failed, and could not write why into {log_dir}. Make room on that file system."
        raise failure.HostFailed(message) from None
    except SignalException as error:
        code = stopping.EXIT_CODE if error.sigval == signal.SIGTERM else 130
        raise failure.Stopped(f"stopped by {signal.Signals(error.sigval).name}", code) from None


def _rank(fn: Callable[..., Any], args: tuple[Any, ...], log_dir: str, parent: int, threads: int) -> Any:
    """A rank's life: undo what a fork inherited, run, and leave a record of what was raised."""
    ranks = env.launched_ranks()
    assert ranks is not None, "torch elastic sets the rank variables"
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        # The parent's handlers are Python code, which never runs while a rank waits inside a collective.
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    rank.die_with(parent)
    torch.set_num_threads(threads)
    folder = Path(log_dir)
    failure.record_stop(ranks.rank, folder)
    try:
        value = fn(*args)
    except BaseException as error:
        failure.write(error, ranks.rank, folder)
        raise
    failure.mark_done(ranks.rank, folder)
    return value


def leave(code: int) -> NoReturn:
    """Ends a rank whose work is done, and whose groups are closed, without taking Python apart.

    A thread of torch's that still ends while Python does aborts the process: 1 rank in 32 on a busy machine, which the
    launcher would take for a failure. Ranks that are forked never take Python apart either.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def passing_logs(prefix: str) -> Iterator[Path]:
    """A temporary folder for ranks' logs. It stays where a rank failed, for the error names a file in it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    except (failure.RankFailed, failure.HostFailed):
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def check_device(field: str, device: str | None, num_ranks: int) -> None:
    """Raises ConfigError where this machine lacks the device that `field` asks for, or has too few for its ranks."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if device not in (None, "cpu") and (found is None or found.type != device):
        there = "none" if found is None else found.type
        raise ConfigError(f"{field}={device}: this machine's accelerator is {there}. Set {field}=cpu or leave it out.")
    if device != "cpu" and found is not None and num_ranks > (count := torch.accelerator.device_count()):
        raise ConfigError(
            f"{num_ranks} ranks: this machine has {count} devices. Ask for {count} ranks, or set {field}=cpu."
        )


def has_accelerator() -> bool:
    """Whether torch finds a device other than the CPU; asking does not start its driver."""
    return torch.accelerator.is_available()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def quiet_elastic() -> Iterator[None]:
    """The launcher's own log lines would bury the one error that matters."""
    prefixes = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(prefixes)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class RankLogs(LogsSpecs):
    """Rank 0 on the terminal, rank n in rankN.stdout.log and rankN.stderr.log of one folder.

    Also tells ranks how often the job was started before: torch counts that for each agent, and agents differ. And
    tells the watch which ranks there are now.
    """

    def __init__(self, folder: Path, rounds: rendezvous.Rounds, watched: watch.Watch):
        super().__init__(str(folder))
        self._folder, self._rounds, self._watched = folder, rounds, watched

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local: int(variables["RANK"]) for local, variables in envs.items()}

        def path(rank: int, kind: str) -> str:
            return str(self._folder / f"rank{rank}.{kind}")

        failure.forget(self._folder, ranks.values())
        self._watched.ranks = tuple(ranks.values())
        for local, variables in envs.items():
            variables["TORCHELASTIC_ERROR_FILE"] = path(ranks[local], "elastic.json")
            variables["TORCHELASTIC_RESTART_COUNT"] = str(self._rounds.before)
            variables[env.LOGS] = str(self._folder)
        return LogsDest(
            stdouts={local: path(rank, "stdout.log") if rank else "" for local, rank in ranks.items()},
            stderrs={local: path(rank, "stderr.log") if rank else "" for local, rank in ranks.items()},
            error_files={local: path(rank, "elastic.json") for local, rank in ranks.items()},
        )

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)
