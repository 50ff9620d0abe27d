"""The README's tree names every file of the packages, and nothing else."""

from __future__ import annotations

import collections

from tree import LONGEST, ROOT, name_of, package_paths, read_tree

REMEDY = "`python tests/tree.py` brings the README's tree up to date"


def test_every_package_file_is_named():
    missing = {name_of(path) for path in package_paths()} - set(read_tree())
    assert missing == set(), REMEDY


def test_everything_named_exists():
    gone = [name for name in read_tree() if not (ROOT / name).exists() or (ROOT / name).is_dir() != name.endswith("/")]
    assert gone == [], REMEDY


def test_every_line_has_a_phrase_of_one_line():
    for name, phrase in read_tree().items():
        assert 8 <= len(phrase) <= LONGEST, f"{name}: {phrase!r}"


def test_test_files_have_unique_names():
    """Two test files of one name cannot both be imported: ranks import a test file by its name."""
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []
