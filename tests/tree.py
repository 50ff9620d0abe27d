"""The README's tree: `python tests/tree.py` brings it up to date, test_tree.py says when that is due.

A file's phrase is the first sentence of its docstring, or of its leading comment in YAML and CUDA, so that it is
written once. A folder speaks by its `__init__.py`; only what has no such text (groups of configs, the top level) keeps
the phrase that stands in the README.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["launch", "configs", "parallel", "moe", "comm", "kernels_ext"]
START, END = "<!-- tree -->\n```text\n", "```\n<!-- /tree -->"
WIDTH = 28  # the column where phrases start
LONGEST = 92  # characters of a phrase


def package_paths() -> list[Path]:
    """Every folder and file of the packages in the tree's order; an `__init__.py` speaks in its folder's line."""
    return [path for folder in FOLDERS for path in _walk(ROOT / folder)]


def _walk(folder: Path) -> list[Path]:
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    entries = [path for path in entries if path.name not in ("__pycache__", "__init__.py")]
    return [folder, *(found for path in entries for found in (_walk(path) if path.is_dir() else [path]))]


def block() -> str:
    """The tree as it stands in the README."""
    return (ROOT / "README.md").read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


def read_tree() -> dict[str, str]:
    """{path relative to the repository: phrase} of the README's tree; folders end in a slash."""
    named: dict[str, str] = {}
    parents: list[str] = []
    for line in block().splitlines():
        match = re.fullmatch(r"( *)(\S+) *(.*)", line)
        assert match, f"README tree: {line!r} is not `name  phrase`"
        depth = len(match[1]) // 2
        parents[depth:] = [match[2]]
        named["".join(parents)] = match[3]
    return named


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() + "/" * path.is_dir()


def phrase_of(path: Path) -> str:
    """First sentence of what a file (a folder: its `__init__.py`) says of itself."""
    source = path / "__init__.py" if path.is_dir() else path
    text = source.read_text(encoding="utf-8") if source.exists() else ""
    if source.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif source.suffix == ".cu":
        said = "\n".join(
            line[3:] for line in itertools.takewhile(lambda line: line.startswith("//"), text.splitlines())
        )
    else:
        said = next((line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line), "")
    first = re.split(r"\.(?:\s|$)", said.partition("\n\n")[0].replace("\n", " "))[0]
    while len(first) > LONGEST and (shorter := re.sub(r"[:;,(][^:;,(]*$", "", first)) != first:
        first = shorter.strip()
    return first


def render() -> str:
    """The tree as it should be: top-level lines of the README as they are, package lines from what is on disk."""
    known = read_tree()
    top = {name: phrase for name, phrase in known.items() if name.split("/")[0] not in FOLDERS}
    here = {name_of(path): phrase_of(path) or known.get(name_of(path), "") for path in package_paths()}
    lines = []
    for name, phrase in ({"moeweave/": ""} | here | top).items():
        depth = name.rstrip("/").count("/")
        leaf = name.rstrip("/").rpartition("/")[2] + "/" * name.endswith("/")
        lines.append(f"{'  ' * depth}{leaf:<{WIDTH - 2 * depth}}{phrase}".rstrip())
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    readme.write_text(before + start + render() + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
