"""Ranks start, and end together: when one raises, is killed, or the user leaves. The first error is what is read."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from moeweave.launch import elastic, failure
from programs import fresh, run, start

SECONDS = 60  # a rank that fails must take the others along well within this


def test_ranks_rendezvous_and_rank_0_answers(tmp_path):
    done = run("elastic_cases", "add", cwd=tmp_path)
    assert (done.code, done.left) == (0, ())
    assert "value 3.0" in done.out
    assert "rank 0 speaks" in done.out
    assert "rank 1 speaks" not in done.out
    assert (tmp_path / "logs/rank1.stdout.log").read_text() == "rank 1 speaks\n"


@pytest.mark.parametrize("case", ["raise_while_others_wait", "raise_while_others_sleep"])
def test_a_rank_that_raises_stops_the_others_and_is_the_one_that_is_named(tmp_path, case):
    done = run("elastic_cases", case, cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert done.seconds < SECONDS
    first, where, report = done.out.splitlines()
    assert first == "rank 1 failed: ValueError: batch_size=3: must be even. Set batch_size=4."
    assert "elastic_cases.py:" in where
    assert where.endswith(f" in {case}")
    assert "Traceback" in (tmp_path / report.split(": ")[1]).read_text()
    assert done.err == ""


def test_a_rank_that_the_system_kills_is_named_and_not_the_one_that_lost_it(tmp_path):
    done = run("elastic_cases", "killed", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert done.seconds < SECONDS
    assert done.out.startswith("rank 1 failed: the process was killed from outside")


def test_a_rank_that_exits_is_named(tmp_path):
    done = run("elastic_cases", "exits", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert done.out.startswith("rank 1 failed: SystemExit: stopped on purpose")


def test_a_rank_without_room_for_its_report_says_so(tmp_path, monkeypatch):
    def launch(*_):
        return lambda *_: json.loads("")  # as torch reads the empty record of a full disk

    monkeypatch.setattr(elastic, "elastic_launch", launch)
    with pytest.raises(failure.HostFailed, match=r"a rank failed, and could not write why into .*logs. Make room"):
        elastic.start_ranks(print, num_ranks=2, log_dir=tmp_path / "logs")


def test_where_the_other_ranks_were_is_kept(tmp_path):
    run("elastic_cases", "raise_while_others_sleep", cwd=tmp_path)
    assert "in raise_while_others_sleep" in (tmp_path / "logs/rank0.stopped.txt").read_text()


def _until_ready(folder):
    deadline = time.monotonic() + 120
    while not all((folder / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int((folder / f"ready{rank}").read_text()) for rank in range(2)]


def test_ctrl_c_ends_all_ranks(tmp_path):
    running = start("elastic_cases", "wait_for_ever", cwd=tmp_path)
    _until_ready(tmp_path)
    running.interrupt()
    asked = time.monotonic()
    done = running.wait()
    assert (done.code, done.left) == (130, ())
    assert time.monotonic() - asked < SECONDS
    assert "interrupted" in done.out
    assert done.err == ""


def _listening(pids):
    """Addresses, as the kernel writes them, on which these processes listen for TCP."""
    links = [os.readlink(path) for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_socket()]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_of_one_machine_listen_on_its_loopback_alone(tmp_path):
    running = start("elastic_cases", "wait_for_ever", cwd=tmp_path)
    ranks = _until_ready(tmp_path)
    found = _listening([running.pid, *ranks])
    running.interrupt()
    assert running.wait().left == ()
    assert found == {"0100007F"}


def test_ranks_do_not_outlive_a_parent_that_is_killed(tmp_path):
    running = start("elastic_cases", "wait_for_ever", cwd=tmp_path)
    _until_ready(tmp_path)
    os.kill(running.pid, signal.SIGKILL)
    done = running.wait()
    assert (done.code, done.left) == (-signal.SIGKILL, ())


def test_ranks_are_started_again_as_often_as_asked(tmp_path):
    done = run("elastic_cases", "fails_once", "1", cwd=tmp_path)
    assert (done.code, done.left) == (0, ())
    assert "value 1" in done.out
    assert "only the first time" in run("elastic_cases", "fails_once", "0", cwd=tmp_path).out


def test_ranks_that_are_spawned_do_the_same(tmp_path):
    """As beside an accelerator; a spawned rank imports for itself, so this one has an interpreter of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\nimport elastic_cases\n"
        "if __name__ == '__main__':\n    sys.exit(elastic_cases.main([sys.argv[2], '0', 'spawn']))\n"
    )
    done = fresh([sys.executable, str(script), str(Path(__file__).parent), "raise_while_others_wait"], cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert done.out.startswith("rank 1 failed: ValueError: batch_size=3: must be even.")
