"""Runs the command-line programs of launch/ in processes of their own, cheaply.

Importing torch and transformers costs each process five CPU seconds. So one process, the nursery, imports them and
forks a child for every run; the child leads a process group, and stops with everything it started when the run is
over or its time is up. What a fork cannot show, the entry point of a fresh interpreter, `fresh` runs.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "MOEWEAVE_TEST_RUN"
# Must not come from the environment of whoever runs the tests.
CLEAN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MOEWEAVE_TRACEBACK")


@dataclass(frozen=True)
class Done:
    """How a run ended. `code` is negative for a signal; `left` are processes of its group that outlived it."""

    code: int
    out: str
    err: str
    seconds: float
    left: tuple[int, ...]


class Run:
    """A run under way; `wait` for its end."""

    def __init__(self, pid: int, out: Path, err: Path):
        self.pid, self._out, self._err, self._started = pid, out, err, time.monotonic()

    def kill(self) -> None:
        """SIGKILL to the program and all its ranks at once."""
        os.killpg(self.pid, signal.SIGKILL)

    def interrupt(self) -> None:
        """What ctrl-C at a terminal does."""
        os.killpg(self.pid, signal.SIGINT)

    def output(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    def wait(self, timeout: float = 150) -> Done:
        """Its end, or TimeoutError after `timeout` seconds; no process is left either way."""
        try:
            answer = _nursery().wait(self.pid, timeout)
        finally:
            left = _group(self.pid)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        seconds = time.monotonic() - self._started
        return Done(answer, self._out.read_text(), self._err.read_text(), seconds, tuple(left))


def start(program: str, *arguments: str, cwd: Path, **environment: str) -> Run:
    """Starts `moeweave.launch.<program>`, or `main` of that module of this folder, in the folder `cwd`."""
    out, err = (Path(tempfile.mkstemp(suffix=suffix, dir=cwd)[1]) for suffix in (".out", ".err"))
    request = dict(
        program=program, arguments=arguments, cwd=str(cwd), environment=environment, out=str(out), err=str(err)
    )
    return Run(_nursery().start(request), out, err)


def run(program: str, *arguments: str, cwd: Path, timeout: float = 150, **environment: str) -> Done:
    """Starts it and waits for its end."""
    return start(program, *arguments, cwd=cwd, **environment).wait(timeout)


def fresh(command: list[str], cwd: Path, timeout: float = 200, **environment: str) -> Done:
    """Runs `command` with an interpreter of its own, from the checkout; raises TimeoutError after `timeout` seconds.

    torchrun gives each rank a session of its own, so what belongs to the run is known by a mark in its environment.
    """
    started, mark = time.monotonic(), uuid.uuid4().hex
    variables = {name: value for name, value in os.environ.items() if name not in CLEAN}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark, **environment}
    with (cwd / "out.txt").open("w+") as out, (cwd / "err.txt").open("w+") as err:
        process = subprocess.Popen(command, cwd=cwd, env=variables, stdout=out, stderr=err, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{command} did not end in {timeout} s\n{(cwd / 'err.txt').read_text()}") from None
        finally:
            left = _soon_gone(lambda pid: _is_marked(pid, mark)) if process.poll() is not None else _marked(mark)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            process.wait()
    texts = ((cwd / name).read_text() for name in ("out.txt", "err.txt"))
    return Done(code, *texts, time.monotonic() - started, tuple(left))


# ---- the nursery


class _Nursery:
    def __init__(self) -> None:
        variables = {name: value for name, value in os.environ.items() if name not in CLEAN}
        variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self.close)

    def start(self, request: dict[str, object]) -> int:
        return self._ask({"start": request})

    def wait(self, pid: int, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self._ask({"poll": pid})) is None:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                while self._ask({"poll": pid}) is None:
                    time.sleep(0.05)
                raise TimeoutError(f"the program did not end in {timeout} s")
            time.sleep(0.05)
        return code

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.stdin.close()
            self._process.wait(60)  # a busy machine takes its time

    def _ask(self, question: dict[str, object]):
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery has died; its traceback is on stderr"
        return json.loads(answer)


_running: list[_Nursery] = []


def _nursery() -> _Nursery:
    if not _running:
        _running.append(_Nursery())
    return _running[0]


def _group(leader: int) -> list[int]:
    """Live processes of the group that `leader` led, after a moment for the last ones to go."""
    return _soon_gone(lambda pid: _in_group(pid, leader))


def _soon_gone(belongs: Callable[[int], bool]) -> list[int]:
    for _ in range(20):
        alive = [pid for pid in _pids() if belongs(pid)]
        if not alive:
            return []
        time.sleep(0.05)
    return alive


def _marked(mark: str) -> list[int]:
    return [pid for pid in _pids() if _is_marked(pid, mark)]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _in_group(pid: int, leader: int) -> bool:
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:3]
    except (OSError, ValueError):
        return False
    return int(group) == leader and state != "Z"


def _serve() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    import transformers.models.mixtral.modeling_mixtral
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from moeweave.launch import agent, inspect, submit, train, trainer, verify  # noqa: F401
    from moeweave.launch.bench import program as bench

    programs = {"train": train.main, "verify": verify.main, "inspect": inspect.main, "bench": bench.main}
    programs["submit"] = submit.main
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer = _fork(programs, **question["start"])
        else:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def _fork(programs, program, arguments, cwd, environment, out, err) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.update(environment)
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.argv = [f"moeweave-{program}", *arguments]
    code = 99
    try:
        main = programs.get(program) or importlib.import_module(program).main
        code = main(list(arguments))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 99
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
