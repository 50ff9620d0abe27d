"""The harness itself: values back, failures told apart, nobody left waiting and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nan_empty import nan_empty
from run_ranks import RankError, RankTimeout, close_pools, run_ranks

QUICK = 20  # seconds; far below the time limits that the blocked ranks would otherwise wait for


def sum_of_ranks(start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total


def test_values_come_back_in_rank_order():
    values = run_ranks(3, sum_of_ranks, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _ in values] == [0, 1, 2]
    for _, total in values:
        torch.testing.assert_close(total, torch.tensor([6.0, 9.0]), rtol=0, atol=0)


def process_and_seeded_draw() -> tuple[int, float]:
    return os.getpid(), torch.rand(()).item()


def test_processes_are_reused_and_seeds_are_not_used_up():
    close_pools()  # ranks that other tests have filled with threads would be replaced
    first, second = run_ranks(2, process_and_seeded_draw), run_ranks(2, process_and_seeded_draw)
    assert first == second
    assert len({pid for pid, _ in first} | {os.getpid()}) == 3
    assert len({draw for _, draw in first}) == 1


def test_fresh_ranks_are_others_and_leave_the_pool_alone():
    pooled = run_ranks(2, process_and_seeded_draw)
    fresh = run_ranks(2, process_and_seeded_draw, fresh=True)
    assert not {pid for pid, _ in pooled} & {pid for pid, _ in fresh}
    assert run_ranks(2, process_and_seeded_draw) == pooled


def group_of_a_mesh() -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    x = distribute_tensor(torch.arange(8.0), mesh["b"], [Shard(0)])
    return (x * 2).redistribute(placements=[Replicate()]).to_local().sum().item()


def test_a_case_does_not_meet_the_groups_of_the_last_one():
    for _ in range(3):
        assert run_ranks(4, group_of_a_mesh) == [56.0] * 4


def raise_in_one_rank(which: int) -> None:
    if dist.get_rank() == which:
        raise KeyError("the marble is gone")
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("which", [0, 1])
def test_one_rank_raises_while_the_other_waits_for_it(which):
    started = time.monotonic()
    said = f"rank {which} of 2 failed: KeyError: 'the marble is gone'"
    with pytest.raises(RankError, match=said) as caught:
        run_ranks(2, raise_in_one_rank, which)
    assert time.monotonic() - started < QUICK
    assert caught.value.rank == which
    assert "in raise_in_one_rank" in caught.value.reports[which]
    assert "still running" in caught.value.reports[1 - which]
    assert "all_reduce" in caught.value.reports[1 - which]
    assert run_ranks(2, sum_of_ranks, torch.zeros(1)) == [(0, torch.ones(1)), (1, torch.ones(1))]


def raise_in_turn() -> None:
    time.sleep(0.3 * (1 - dist.get_rank()))
    raise ValueError(f"from rank {dist.get_rank()}")


def test_every_traceback_is_shown_and_the_first_failure_comes_first():
    with pytest.raises(RankError) as caught:
        run_ranks(2, raise_in_turn)
    text = str(caught.value)
    assert caught.value.rank == 1
    assert 0 < text.index("ValueError: from rank 1") < text.index("ValueError: from rank 0")


def leave(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(7)
        if how == "sys.exit":
            sys.exit("not today")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize(
    ("how", "said"),
    [("exit", r"exit code 7"), ("kill", "killed by SIGKILL"), ("sys.exit", "SystemExit: not today")],
)
def test_one_rank_ends_its_process(how, said):
    started = time.monotonic()
    with pytest.raises(RankError, match=f"rank 1 of 2 failed: .*{said}"):
        run_ranks(2, leave, how)
    assert time.monotonic() - started < QUICK
    assert len(run_ranks(2, sum_of_ranks, torch.zeros(1))) == 2


def wait_in_rank(which: int) -> int:
    if dist.get_rank() == which:
        time.sleep(600)
    return dist.get_rank()


def test_time_limit_says_who_is_late_and_where():
    with pytest.raises(RankTimeout, match=r"ranks \[1\] did not finish in 1 s") as caught:
        run_ranks(2, wait_in_rank, 1, timeout=1)
    assert set(caught.value.reports) == {1}
    assert "wait_in_rank" in caught.value.reports[1]
    assert run_ranks(2, wait_in_rank, 5) == [0, 1]


def return_something_that_does_not_pickle():
    return lambda: None


def test_values_and_arguments_must_pickle():
    with pytest.raises(ValueError, match="defined at module level"):
        run_ranks(2, lambda: None)
    with pytest.raises(RankError, match="pickle"):
        run_ranks(2, return_something_that_does_not_pickle)


def uninitialised_means() -> list[float]:
    x = torch.ones(3)
    with nan_empty():
        inside = [torch.empty(5), torch.empty_like(x), x.new_empty(4), torch.empty(2, dtype=torch.bfloat16)]
    assert not torch.are_deterministic_algorithms_enabled()
    return [t.float().mean().item() for t in inside]


def test_uninitialised_memory_is_nan_here_and_on_ranks(nan_empty):
    assert torch.empty(7, 3).isnan().all()
    assert torch.zeros(2).new_empty(4).isnan().all()
    for means in run_ranks(2, uninitialised_means):
        assert all(mean != mean for mean in means)


SESSION = """
import os, time, torch, torch.distributed as dist
from pathlib import Path
from run_ranks import run_ranks

def note(folder):
    Path(folder, str(os.getpid())).touch()
    Path(folder, str(os.getppid())).touch()  # the server that ranks are forked from

def block(folder):
    note(folder)
    Path(folder, "blocked").touch()
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1))
    time.sleep(600)

def test_pass():
    run_ranks(2, note, os.environ["NOTES"])

def test_block():
    run_ranks(2, block, os.environ["NOTES"])
"""


@pytest.fixture
def short():
    """A temporary folder with a short name: paths of sockets end at 107 characters."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield folder


@pytest.fixture
def session(tmp_path, short):
    """Starts a test session of its own on one of the tests above; gives the process and its folder of notes."""
    (tmp_path / "test_session.py").write_text(SESSION)
    (tmp_path / "conftest.py").write_text(
        "from run_ranks import close_pools\ndef pytest_unconfigure(): close_pools()\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    notes = tmp_path / "notes"
    notes.mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "NOTES": str(notes),
        "TMPDIR": short,
    }
    started = []

    def start(test: str) -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", test, str(tmp_path)]
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
        return started[-1], notes

    yield start
    for process in started:
        process.kill()
        process.wait()


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, and not yet waited for by whoever inherited it


def assert_gone(notes: Path, short: str) -> None:
    """Every noted process ends within seconds, and the temporary folder of the session is empty."""
    pids = [int(note.name) for note in notes.iterdir() if note.name.isdigit()]
    assert len(pids) == 3
    deadline = time.monotonic() + QUICK
    while alive := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.1)
    assert [str(path) for path in Path(short).glob("ranks-*")] == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_nothing_is_left_after_a_session(session, short):
    process, notes = session("test_pass")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert_gone(notes, short)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_nothing_is_left_when_the_session_is_killed(session, short):
    process, notes = session("test_block")
    deadline = time.monotonic() + 100
    while not (notes / "blocked").exists() or len(list(notes.iterdir())) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert_gone(notes, short)
