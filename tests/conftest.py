"""What every test gets: the same seeds, ranks that end with the session, and a skip where a device is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

import pytest
import torch
from packaging.version import Version

from nan_empty import nan_empty as nan_empty_memory
from run_ranks import close_pools, seed_everything


def pytest_configure() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, here and on ranks


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs = item.get_closest_marker("transformers")
    if needs and Version(metadata.version("transformers")) < Version(needs.args[0]):
        pytest.skip(f"needs transformers {needs.args[0]}: {needs.args[1]}")
    ranks = item.get_closest_marker("ranks")
    wanted = ranks.args[0] if ranks else 1
    for device in ("gpu", "npu"):
        if item.get_closest_marker(device) and (found := _device_count(device)) < wanted:
            pytest.skip(f"needs {wanted} {device}, this machine has {found}")


def pytest_unconfigure() -> None:
    close_pools()


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    seed_everything()


@pytest.fixture
def nan_empty() -> Iterator[None]:
    """Uninitialised memory of this test's own process is NaN; on ranks use the context manager of nan_empty.py."""
    with nan_empty_memory():
        yield


def _device_count(device: str) -> int:
    if device == "gpu":
        return torch.cuda.device_count() if torch.version.cuda else 0
    npu = getattr(torch, "npu", None)  # torch_npu adds it when it can load
    return npu.device_count() if npu is not None else 0
