"""Every way to install gives every file of every package, as a real file."""

from __future__ import annotations

import ast
import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["comm", "configs", "kernels_ext", "launch", "moe", "parallel"]


def package_files() -> set[str]:
    """What an installation must hold, by import path: all that lies in the package folders."""
    names = {"moeweave/__init__.py", "moeweave/py.typed"}
    for folder in FOLDERS:
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        names |= {f"moeweave/{path.relative_to(ROOT).as_posix()}" for path in files}
    return names


def python(*words: str | Path, executable: str | Path = sys.executable, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run([executable, *words], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(what: str, source: Path, out: Path) -> Path:
    """An sdist or a wheel, with the setuptools that is installed."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
    return out / python("-c", code, out, cwd=source).stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy to build in: a build leaves folders that the next one would pick up."""
    copy = tmp_path_factory.mktemp("checkout") / "moeweave-copy"
    for name in [*FOLDERS, "moeweave"]:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["setup.py", "pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", checkout, tmp_path_factory.mktemp("wheel")))


def test_wheel_holds_every_package_file(wheel):
    held = {name for name in wheel.namelist() if not name.startswith("moeweave-")}
    assert held == package_files()
    links = [entry.filename for entry in wheel.infolist() if (entry.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []


def test_sdist_holds_every_package_file_and_builds_the_same_wheel(checkout, wheel, tmp_path):
    with tarfile.open(build("sdist", checkout, tmp_path)) as archive:
        assert [entry.name for entry in archive if entry.issym() or entry.islnk()] == []
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = zipfile.ZipFile(build("wheel", source, tmp_path))
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_commands_of_the_wheel_exist(wheel):
    entries = configparser.ConfigParser()
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entries.read_string(wheel.read(name).decode())
    commands = dict(entries["console_scripts"])
    assert set(commands) >= {"moeweave-train", "moeweave-inspect", "moeweave-verify"}
    for target in commands.values():
        module, _, function = target.partition(":")
        tree = ast.parse(wheel.read(f"{module.replace('.', '/')}.py"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_requirements_admit_what_users_have(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = message_from_string(wheel.read(name).decode())
    assert metadata["Version"] == "0.1.0"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])  # newer, older setuptools
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {one.name: one.specifier for one in required if one.marker is None}
    assert not core["torch"].contains("2.10.0")
    assert core["torch"].contains("2.11.0+cu130")
    for version in ["1.3.0", "1.3.2", "1.4.0"]:  # another library may pin any of these
        assert core["hydra-core"].contains(version)
    extras = {extra: wanted_by(extra, required) for extra in ["hf", "deepspeed", "dev", "npu", "all"]}
    assert extras["all"] == extras["hf"] | extras["deepspeed"] | extras["dev"]
    assert all(extras.values())


def wanted_by(extra: str, required: list[Requirement]) -> set[str]:
    chosen = (one for one in required if one.marker and one.marker.evaluate({"extra": extra}))
    return {f"{one.name}{one.specifier}" for one in chosen}


FIND = """
import importlib.util, json, sys
from importlib.machinery import PathFinder
here = importlib.util.find_spec("moeweave").submodule_search_locations
specs = {name: PathFinder.find_spec(f"moeweave.{name}", here) for name in sys.argv[1:]}
print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))
"""


def where_packages_are(executable: Path, cwd: Path, **environment: str) -> dict[str, Path]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = python("-c", FIND, *FOLDERS, executable=executable, cwd=cwd, env=clean | environment)
    return {name: Path(origin).resolve() for name, origin in json.loads(done.stdout).items()}


@pytest.mark.parametrize("how", ["bare", "editable", "normal"])
def test_packages_are_found(how, checkout, wheel, tmp_path):
    """From a checkout on the path, from `pip install -e .`, and from `pip install .`"""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    executable = home / "bin" / "python"
    if how == "bare":
        found = where_packages_are(executable, tmp_path, PYTHONPATH=str(checkout))
        assert found == {name: checkout.resolve() / name / "__init__.py" for name in FOLDERS}
        return
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (site / "builder.pth").write_text(sysconfig.get_path("purelib"))  # lends pip and setuptools
    what = ["--editable", str(checkout)] if how == "editable" else [wheel.filename]
    python(
        "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *what, executable=executable, cwd=tmp_path
    )
    (site / "builder.pth").unlink()
    found = where_packages_are(executable, tmp_path)
    if how == "editable":
        assert found == {name: checkout.resolve() / name / "__init__.py" for name in FOLDERS}
    else:
        assert found == {name: site.resolve() / "moeweave" / name / "__init__.py" for name in FOLDERS}
    assert (home / "bin" / "moeweave-train").exists()


def test_a_clone_without_links_is_told_the_remedy(checkout, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(checkout, clone, symlinks=True)
    (clone / "moeweave" / "comm").unlink()
    (clone / "moeweave" / "comm").write_text("../comm")  # what git leaves where links are off
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=clone, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "moeweave/comm is not a link" in done.stderr
    assert "core.symlinks=true" in done.stderr
