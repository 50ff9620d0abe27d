"""What an agent starts for each rank: the user's script or module, as Python would run it, tied to the agent's life.

A plain child outlives an agent that is killed, and then holds its devices and its peers. This file is run by its path
and imports nothing of moeweave, so that a script starts as quickly as without it.
"""

import ctypes
import os
import runpy
import signal
import sys


def main() -> None:
    """`rank.py script.py arguments` or `rank.py -m module arguments`."""
    die_with(int(os.environ.pop("MOEWEAVE_AGENT")))
    words = sys.argv[1:]
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this file's folder, which Python 3.11 leaves out where PYTHONSAFEPATH is set
    if words[0] == "-m":
        _search(os.getcwd())  # noqa: PTH109
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        _search(os.path.dirname(os.path.abspath(words[0])))  # noqa: PTH100, PTH120
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _search(folder: str) -> None:
    """Imports look into `folder` first, as when Python itself runs the module or script."""
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, folder)


def die_with(parent: int) -> None:
    """Ends this process when `parent` dies, even by SIGKILL (Linux)."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
