"""torch-npu on a machine without CANN: stand-ins for the libraries that it needs, which do nothing.

Operators of torch-npu then have their schemas, and run on meta tensors by the shape functions that it ships. Values are
beyond them. A process with the stand-ins must be its own: torch believes that it has an NPU there.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

# What libtorch_npu.so and its siblings ask the loader for; CANN's own names begin like this.
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
OF_CANN = re.compile(r"^(acl|Hccl|Msprof|ge[A-Z]|rt[A-Z]|dcmi|atb)")


def build(package: Path, folder: Path) -> Path:
    """Compile stand-ins for what `package` (an unpacked torch_npu) lacks into `folder`, by gcc.

    Every function returns 0, and so says success. Raises CalledProcessError where gcc or nm fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [*package.glob("lib/*.so"), *package.glob("_C*.so")]
    missing = sorted({name for path in libraries for name in _symbols(path) if OF_CANN.match(name)})
    source = folder / "stub.c"
    source.write_text("\n".join(f"long {name}() {{ return 0; }}" for name in missing) + "\n", encoding="utf-8")
    compile_ = ["gcc", "-shared", "-fPIC", "-w", "-O1"]
    subprocess.run([*compile_, "-o", folder / "libascendcl.so", source], check=True, timeout=120)
    (folder / "empty.c").write_text("", encoding="utf-8")
    for name in LIBRARIES[1:]:
        subprocess.run([*compile_, "-o", folder / f"lib{name}.so", folder / "empty.c"], check=True, timeout=120)
    return folder


def environment(site: Path, stubs: Path, root: Path) -> dict[str, str]:
    """Variables of a process that imports torch_npu from `site` over the stand-ins in `stubs`."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    libraries = [stubs, Path(torch.origin).parent / "lib", site / "torch_npu" / "lib"]
    return {
        "PATH": "/usr/bin:/bin",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONPATH": ":".join(map(str, [root, root / "tests", root / "tests" / "comm", site])),
        # Loaded by hand below: torch would import it before it is ready.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "HOME": str(stubs),
    }


def tag() -> str:
    """The interpreter's and machine's tags, as in a wheel's name: cp311-x86_64."""
    return f"cp{sys.version_info.major}{sys.version_info.minor}-{sysconfig.get_platform().rpartition('-')[2]}"


def _symbols(path: Path) -> set[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    return {line.split()[-1] for line in listing.splitlines() if line.strip() and "@" not in line}
