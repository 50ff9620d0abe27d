"""Uninitialised memory that is NaN: what a kernel forgets to write then shows in every result that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic


@contextmanager
def nan_empty() -> Iterator[None]:
    """Within it `empty`, `empty_like`, `new_empty` and a growing `resize_` give NaN (integers: their largest value).

    PyTorch fills them itself under deterministic algorithms, C++ callers included. In a test it is the fixture of
    the same name; ranks do not see that one, so a function that runs on ranks enters this context.
    """
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was, warn_only=warned)
