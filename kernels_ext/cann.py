"""torch-npu without CANN, whose libraries it cannot do without: set aside, so that a CPU process never meets it.

Installed, it has torch import it; without CANN that fails, and `import torch` with it. transformers imports it as soon
as it is found. So where torch-npu is installed and CANN's libraries cannot be loaded, both are told that it is absent.
This runs before torch is imported, and imports nothing itself; a program that imports torch before moeweave has to set
TORCH_DEVICE_BACKEND_AUTOLOAD=0 on its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

LIBRARIES = ("libascendcl.so", "libhccl.so")


def set_torch_npu_aside() -> str | None:
    """Hide torch-npu from this process and its children where it cannot load; return why, None if it is left alone."""
    if "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is None:
        return None
    reason = _missing_library()
    if reason is not None:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        sys.modules["torch_npu"] = None  # type: ignore[assignment]  # Python's own mark of a module that is not there
    return reason


def _missing_library() -> str | None:
    """What the loader says of the first of CANN's libraries that it does not find, None if all load."""
    try:
        for name in LIBRARIES:
            ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return None
