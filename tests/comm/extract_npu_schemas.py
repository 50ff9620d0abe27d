"""Reads operator schemas out of torch-npu wheels: `python extract_npu_schemas.py a.whl b.whl` writes npu_schemas.json.

The wheels are read as archives, never installed. A release's entry holds the overloads of every operator that the
library calls.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

DATA = Path(__file__).with_name("npu_schemas.json")
ROOT = Path(__file__).resolve().parent.parent.parent
LISTING = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def called_names() -> set[str]:
    """Names of the operators that the library calls: the string that every `call("npu_...", ...)` starts with."""
    files = [*(ROOT / "comm").rglob("*.py"), *(ROOT / "kernels_ext").rglob("*.py")]
    calls = r"call\(\s*\"(npu_\w+)\""
    return {name for path in files for name in re.findall(calls, path.read_text(encoding="utf-8"))}


def schemas_in(wheel: Path, names: set[str]) -> dict[str, list[str]]:
    """{name: schema of each of its overloads} of a wheel."""
    listing = zipfile.ZipFile(wheel).read(LISTING).decode()
    lines = re.findall(r"func: (.+)", listing)
    return {name: [line for line in lines if re.match(rf"{name}(\.\w+)?\(", line)] for name in sorted(names)}


def main() -> None:
    wheels = [Path(argument) for argument in sys.argv[1:]]
    found = {wheel.name.split("-")[1]: schemas_in(wheel, called_names()) for wheel in wheels}
    DATA.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
