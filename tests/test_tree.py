"""The README's tree names every file of the packages with the phrase that the file says of itself."""

from __future__ import annotations

import collections

from tree import LONGEST, ROOT, block, name_of, package_paths, read_tree, render

REMEDY = "`python tests/tree.py` brings the README's tree up to date"


def test_the_tree_says_what_the_files_say():
    assert set(read_tree()) >= {name_of(path) for path in package_paths()}, REMEDY
    assert block() == render(), REMEDY


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
