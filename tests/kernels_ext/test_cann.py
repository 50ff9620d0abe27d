"""torch-npu installed where there is no CANN: `import torch` breaks, and moeweave's programs run all the same.

torch-npu lies unpacked beside the environment (`make test` puts it there); only these processes have it on their path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from moeweave.kernels_ext import cann

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = Path(sys.prefix) / "torch-npu"

needs_torch_npu = pytest.mark.skipif(
    not (SITE / "torch_npu").is_dir() or cann._missing_library() is None, reason="needs torch-npu unpacked, and no CANN"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with torch-npu installed as far as it can tell, autoload as torch has it by default."""
    names = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    names["PYTHONPATH"] = f"{ROOT}:{SITE}"
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=names, check=False, capture_output=True, text=True, timeout=240)


@needs_torch_npu
def test_torch_alone_does_not_load_there() -> None:
    done = run("-c", "import torch")
    assert done.returncode != 0
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stderr


@needs_torch_npu
def test_programs_run_on_the_cpu_and_an_npu_is_refused(tmp_path: Path) -> None:
    program = f"""
import moeweave as mw, sys, transformers
from moeweave.launch.bench.program import main
transformers.Qwen3MoeForCausalLM
assert sys.modules["torch_npu"] is None
assert main(["ranks=2", "device=cpu", "max_size=1024", "out={tmp_path}"]) == 0
print(mw.Mesh(device="cpu"))
try:
    mw.Mesh(device="npu")
except ValueError as error:
    print(error)
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all_reduce" in done.stdout
    assert "Mesh(one rank, device=cpu)" in done.stdout
    assert "device ('npu') must have torch-npu and CANN" in done.stdout


def test_nothing_is_done_where_torch_npu_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if "torch-npu" in {each.metadata["Name"] for each in metadata.distributions()}:
        pytest.skip("torch-npu is installed")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    assert cann.set_torch_npu_aside() is None
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
    assert "torch_npu" not in sys.modules


def test_the_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cann, "LIBRARIES", ("libc.so.6", "libno-such-thing.so"))
    assert "libno-such-thing.so" in str(cann._missing_library())
    monkeypatch.setattr(cann, "LIBRARIES", ("libc.so.6",))
    assert cann._missing_library() is None
