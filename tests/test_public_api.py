"""`import moeweave as mw`: every public name is listed, said what it is for, and documented."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import moeweave as mw


def test_the_list_is_complete_and_sorted():
    """What the module binds besides its packages is in `__all__`, classes before functions."""
    bound = {name for name, value in vars(mw).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert bound - {"set_torch_npu_aside"} == set(mw.__all__)
    assert mw.__all__ == sorted(mw.__all__)


@pytest.mark.parametrize("name", mw.__all__)
def test_a_public_name_is_documented(name):
    assert re.search(rf"\b{name}\b", mw.__doc__), "the module's docstring says what each name is for"
    own = inspect.getdoc(getattr(mw, name)) or ""
    assert len(own) > 40
    assert not own.startswith(f"{name}("), "a dataclass's signature is no docstring"


def test_import_leaves_optional_packages_alone():
    optional = ["transformers", "peft", "deepspeed", "hydra", "omegaconf", "matplotlib", "rich", "triton", "torch_npu"]
    code = f"import sys, moeweave; sys.exit(', '.join(name for name in {optional} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_import_brings_no_compiler_that_torch_does_not_bring():
    """Dynamo, which torch's pipelining imports as well, would be a seventh of the time that `import moeweave` takes."""
    code = (
        "import sys, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor.parallel\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "import moeweave\n"
        "sys.exit(('torch._dynamo' in sys.modules) != before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
