"""One agent a host: torchrun with its stores on one address, and one readable line for what failed.

`python -m moeweave.launch.agent <torchrun's options> <script or -m module> <its arguments>`. torchrun's options also
come by its environment variables (PET_NNODES, PET_RDZV_ENDPOINT, ...), which keeps the job's token off command lines
that everyone on a host can read. The agent of node rank 0 serves the rendezvous.

Exit codes: 0 done, 1 ranks failed, 2 the ranks could not be started, 143 stopped by a signal.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from moeweave.launch import env, failure, rank, rendezvous, watch
from moeweave.launch.elastic import RankLogs, quiet_elastic


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = get_args_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if env.has_lifeline():
        _stop_with_stdin()
    folder = Path(arguments.log_dir or "logs").absolute()
    watched = watch.Watch(folder)
    try:
        config, command, words = _config(arguments, folder, watched)
        with quiet_elastic(), watch.watching(watched):
            elastic_launch(config, command)(*words)
    except ChildFailedError as error:
        return _say(failure.describe(_first(error, folder)), 1)
    except SignalException as error:
        return _say(f"stopped by {signal.Signals(error.sigval).name}", 128 + error.sigval)
    except RendezvousTimeoutError:
        fewest = arguments.nnodes.partition(":")[0]
        return _say(f"fewer than {fewest} hosts came to {arguments.rdzv_endpoint} in time: see the others' agents.", 1)
    except RendezvousError:
        return _say(f"the agent at {arguments.rdzv_endpoint}, where the hosts meet, is gone: see what it said.", 1)
    except (OSError, ValueError) as error:
        return _say(str(error), 2)
    return 0


def _config(arguments: Any, folder: Path, watched: watch.Watch) -> tuple[LaunchConfig, Any, list[str]]:
    """torchrun's own reading of its arguments, with the rendezvous and the logs replaced."""
    if not arguments.rdzv_endpoint:
        arguments.rdzv_endpoint = f"{arguments.master_addr}:{arguments.master_port}"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    is_host = int(arguments.node_rank) == 0
    arguments.rdzv_backend, arguments.node_rank = rendezvous.BACKEND, 0  # torchrun warns of a node rank
    config, command, words = config_from_args(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    config.rdzv_configs, rounds = rendezvous.settings(is_host, **config.rdzv_configs)
    config.logs_specs = RankLogs(folder, rounds, watched)
    config.local_addr = config.local_addr or _local_address(config, is_host)
    env.use_interface(rendezvous.interface_of(config.local_addr))
    env.use_a_store_per_restart()
    env.name_agent(os.getpid())
    if words[0] == "-u":  # Python runs it, not a program of another kind
        words = ["-u", rank.__file__, *words[1:]]
    return config, command, words


def _local_address(config: LaunchConfig, is_host: bool) -> str:
    """The address by which ranks of other hosts reach this one: of the interface that is named, else of the way."""
    if named := env.interface_named():
        return rendezvous.address_of(named)
    host, _ = rendezvous.endpoint(config.rdzv_endpoint)
    address = rendezvous.resolve(host, timeout=60)
    return address if is_host else rendezvous.own_address(address)


def _stop_with_stdin() -> None:
    """The launcher holds the other end of standard input: when it closes, or the launcher dies, all here ends."""

    def wait() -> None:
        while os.read(0, 1024):  # not by sys.stdin, whose lock Python would miss when it ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="lifeline").start()


def _first(error: ChildFailedError, folder: Path) -> failure.Failure:
    """The earliest failure among this host's ranks: what `record` kept of it, else the last line the rank wrote."""
    rank, first = error.get_first_failure()
    if (record := failure.read(rank, folder)) is not None:
        return record
    message: Any = first.message
    if isinstance(message, dict):
        message = message.get("message", message)
    log = folder / f"rank{rank}.stderr.log"
    said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    if not Path(first.error_file).exists():
        how = f"killed by {first.signal_name()}" if first.exitcode < 0 else f"exit code {first.exitcode}"
        message = f"{_exception_in(said)} ({how})" if said else how
    return failure.Failure(rank, str(message).strip(), "", int(first.timestamp * 1e9), str(log) if said else "")


def _exception_in(lines: list[str]) -> str:
    """The last line that names an exception, as Python ends a traceback, or the last line of all."""
    named = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return (named or lines)[-1]


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
