"""Runs the tests on other releases of torch, transformers and hydra, each in its own environment: `make test-matrix`.

Prints a table in Markdown. Logs stay in .venv-matrix/, an environment only where its tests failed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-matrix"
ROWS = {
    "torch-2.11.0": ["torch==2.11.0"],
    "transformers-5.0": ["transformers==5.0.*"],
    "transformers-5.9": ["transformers==5.9.*"],
    "transformers-5.17": ["transformers==5.17.*"],
    "transformers-5.20": ["transformers==5.20.*"],
    "transformers-newest": ["transformers"],
    "hydra-1.4": ["hydra-core==1.4.0rc3", "hydra-submitit-launcher==1.4.0rc3"],
}
VERSIONS = "from importlib.metadata import version as v; print(v('torch'), '|', v('transformers'))"


def main(names: list[str]) -> int:
    if unknown := set(names) - set(ROWS):
        print(f"test-matrix: no row {sorted(unknown)}; the rows are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    table = ["| row | torch | transformers | tests |", "|---|---|---|---|"]
    failed = False
    for name in names or ROWS:
        versions, result, passed = run_row(name, ROWS[name])
        table.append(f"| {name} | {versions} | {result} |")
        print(table[-1], flush=True)
        failed |= not passed
    print("\n" + "\n".join(table))
    return int(failed)


def run_row(name: str, requirements: list[str]) -> tuple[str, str, bool]:
    """Installs and tests one row: its versions, pytest's closing line, and whether all passed."""
    home = FOLDER / name
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    pip = [home / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = [word for word in requirements if word.startswith("torch=")] or shlex.split(os.environ["TORCH"])
    with (FOLDER / f"{name}.log").open("w") as log:
        for command in ([*pip, *torch], [*pip, "--editable", ".[all]", *requirements]):
            if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode:
                return "- | -", f"could not be installed, see {log.name}", False
        tests = [home / "bin/pytest", "-n", "logical", *shlex.split(os.environ.get("ARGS", ""))]
        done = subprocess.run(tests, cwd=ROOT, stdout=log, stderr=log, check=False)
    versions = subprocess.run([home / "bin/python", "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    closing = Path(log.name).read_text(errors="replace").strip().splitlines()[-1].strip("= ")
    if done.returncode == 0:
        shutil.rmtree(home)
    return versions.strip(), closing, done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
