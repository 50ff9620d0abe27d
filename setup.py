"""Packages the folders of this repository under the import name moeweave.

`moeweave/` holds one link per package folder, so find_packages sees moeweave.comm, moeweave.moe and so on, and a wheel
or an sdist gets real files.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FOLDERS = ["comm", "configs", "kernels_ext", "launch", "moe", "parallel"]

broken = [name for name in FOLDERS if not (HERE / "moeweave" / name).is_dir()]
if broken:
    sys.exit(
        f"moeweave/{broken[0]} is not a link to the folder {broken[0]}/: this copy was made without symbolic links.\n"
        "Remedy: clone with `git clone -c core.symlinks=true ...` (on Windows with Developer Mode on), or repair this "
        "clone with `git config core.symlinks true && git checkout -- moeweave`."
    )

HF = ["transformers>=5.0", "peft>=0.18", "accelerate>=1.1"]
DEEPSPEED = ["deepspeed>=0.19.8"]
DEV = [
    "hydra-submitit-launcher",
    "hypothesis",
    "import-linter>=2.1",
    "mypy>=1.15",
    "pytest>=8.2",
    "pytest-timeout",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=70.1",
]

setup(
    name="moeweave",
    version="0.1.0",
    description="Distributed mixture-of-experts parallelism for PyTorch and Hugging Face models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["moeweave*"]),
    package_data={
        "moeweave": ["py.typed"],
        "moeweave.configs": ["**/*.yaml"],
        "moeweave.kernels_ext.block_signals": ["csrc/*.cu"],
        "moeweave.kernels_ext.onesided": ["csrc/*.cu"],
        "moeweave.kernels_ext.swiglu": ["csrc/*.cu"],
    },
    install_requires=["torch>=2.11", "numpy", "hydra-core>=1.3", "matplotlib", "pyyaml", "rich", "safetensors"],
    extras_require={
        "hf": HF,
        "deepspeed": DEEPSPEED,
        "npu": ["torch==2.13.*", "torch-npu==2.13.*"],
        "dev": DEV,
        "all": HF + DEEPSPEED + DEV,
    },
    entry_points={
        "console_scripts": [
            "moeweave-train = moeweave.launch.train:main",
            "moeweave-inspect = moeweave.launch.inspect:main",
            "moeweave-verify = moeweave.launch.verify:main",
            "moeweave-bench = moeweave.launch.bench.program:main",
            "moeweave-submit = moeweave.launch.submit:main",
        ]
    },
    zip_safe=False,
)
