"""Files that a comparison is given, checked while its arguments are read: before anything is measured."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def file_to_write(text: str) -> Path:
    """`type=` of an argument: a place that a file can be written to."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: no file can be written there. Name one in a folder that exists")
    return path


def file_of_figures(text: str) -> dict[str, Any]:
    """`type=` of an argument: what `compare models --out` wrote."""
    try:
        found = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}. Name a file of `compare models --out`") from None
    if not isinstance(found, dict) or "methods" not in found:
        raise argparse.ArgumentTypeError(f"{text}: holds no methods. Name a file of `compare models --out`")
    return found
