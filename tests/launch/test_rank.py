"""A rank's script or module sees what it would see if Python itself ran it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeweave.launch import rank

TELL = "import sys\nprint(__name__, sys.argv, sys.path[0], 'beside' in sys.modules or __import__('beside').NAME)\n"


def python(*words, cwd, **environment):
    variables = {**os.environ, "MOEWEAVE_AGENT": str(os.getpid()), **environment}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tell.py").write_text(TELL)
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


@pytest.mark.parametrize("words", [["../tell.py", "a b", "--x"], ["-m", "tell", "a b"]])
@pytest.mark.parametrize("safe", ["", "1"])
def test_a_rank_runs_as_python_does(folder, words, safe):
    cwd = folder / "elsewhere" if words[0] != "-m" else folder
    environment = {"PYTHONSAFEPATH": safe, "PYTHONPATH": str(folder) if safe else ""}
    plain = python(*words, cwd=cwd, **environment)
    ours = python(rank.__file__, *words, cwd=cwd, **environment)
    assert plain.returncode == 0, plain.stderr
    if words[0] == "-m":
        assert ours.stdout.split("[")[0] == plain.stdout.split("[")[0]
        assert ours.stdout.split("] ")[1] == plain.stdout.split("] ")[1]
    else:
        assert ours.stdout == plain.stdout, ours.stderr


def test_a_rank_whose_agent_is_gone_ends_at_once(folder):
    done = python(rank.__file__, "tell.py", cwd=folder, MOEWEAVE_AGENT="1")
    assert (done.returncode, done.stdout) == (-9, "")


def test_this_file_needs_nothing_of_moeweave():
    assert "moeweave" not in "".join(
        line for line in Path(rank.__file__).read_text().splitlines() if line.startswith(("import", "from"))
    )
