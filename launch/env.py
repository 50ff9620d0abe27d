"""Every environment variable that moeweave reads, read here and nowhere else (but for HCCL's own).

| Variable                   | Set by        | Meaning here                                                         |
|----------------------------|---------------|----------------------------------------------------------------------|
| RANK, WORLD_SIZE           | torchrun      | there: use these ranks; absent: the program starts ranks of its own  |
| LOCAL_RANK                 | torchrun      | which device of this machine the rank takes                          |
| TORCHELASTIC_RESTART_COUNT | torch elastic | how often the ranks were restarted, 0 at first                       |
| OMP_NUM_THREADS            | the user      | CPU threads of a rank; absent: the cores divided by the ranks        |
| MOEWEAVE_TRACEBACK         | the user      | 1: print a whole traceback where an error would be one line          |
| MOEWEAVE_AGENT             | the agent     | its process id, for rank.py to end with it                           |
| MOEWEAVE_LOGS              | the launcher  | where the ranks' logs are, and where a rank shows that it gets on    |
| MOEWEAVE_LIFELINE          | the launcher  | 1: the agent stops when its standard input ends                      |
| GLOO_SOCKET_IFNAME         | the user      | the interface whose address the agent gives to other hosts           |
| HCCL_BUFFSIZE              | the user      | the window of HCCL in MB, which the ascend dispatcher checks         |

Set by `import moeweave`: TORCH_DEVICE_BACKEND_AUTOLOAD=0, where torch-npu is installed without CANN.
Set here for the ranks that this program starts, unless the user has set them: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1;
GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, so that ranks listen on the interface that they share and on no other;
KINETO_LOG_LEVEL=6, by `moeweave-bench`.
What torch, transformers and rich read for themselves (MASTER_ADDR, NCCL_SOCKET_IFNAME, NO_COLOR, ...) is theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LOGS = "MOEWEAVE_LOGS"


@dataclass(frozen=True)
class Ranks:
    """The ranks that a launcher started: this one's number, how many there are, its number on this machine."""

    rank: int
    world: int
    local_rank: int
    restarts: int = 0


def launched_ranks() -> Ranks | None:
    """This process's place among ranks that torchrun (or this program) started, or None when nobody did.

    Raises ValueError when only some of the variables are set, or one is no number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return None
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"environment: {', '.join(found)} set but {', '.join(missing)} missing. "
            "Start the program with torchrun, which sets all of them, or unset them to let it start its own ranks."
        )
    try:
        rank, world, local_rank = (int(found[name]) for name in names)
    except ValueError as error:
        raise ValueError(f"environment: {found} must be whole numbers. Unset them or use torchrun.") from error
    return Ranks(rank, world, local_rank, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def threads_asked() -> int:
    """OMP_NUM_THREADS, or 0 where the user has not set it."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() else 0


def use_a_store_per_restart() -> None:
    """Tells torch elastic, in this process's environment, to give restarted ranks a new store to meet in.

    Otherwise they read the addresses of the ranks before them in the old one, and wait for those (pytorch#135712).
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def quiet_profiler() -> None:
    """torch's profiler, here and in processes started from here, prints no line each time it starts and stops."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def with_libraries(folders: Iterable[Path]) -> dict[str, str]:
    """This process's environment with `folders` first where a program that it starts looks for shared libraries."""
    before = os.environ.get("LD_LIBRARY_PATH", "")
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*map(str, folders), *filter(None, [before])])}


def use_interface(name: str | None) -> None:
    """Ranks that this process starts listen on that network interface; None leaves the choice to the libraries."""
    if name is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)


def interface_named() -> str | None:
    """The network interface that the user names for gloo."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or None


def name_agent(pid: int) -> None:
    """Tells the ranks that this process starts whom they belong to."""
    os.environ["MOEWEAVE_AGENT"] = str(pid)


def logs_of_ranks() -> Path | None:
    """The folder where whoever started this rank looks for its beats and records; None under plain torchrun."""
    value = os.environ.get(LOGS)
    return Path(value) if value else None


def has_lifeline() -> bool:
    """Whether the end of standard input means that the launcher is gone."""
    return os.environ.get("MOEWEAVE_LIFELINE", "") == "1"


def wants_traceback() -> bool:
    """Whether the user asked for whole tracebacks."""
    return os.environ.get("MOEWEAVE_TRACEBACK", "") == "1"
