"""How transformers records router logits and hidden states while a model runs."""

from __future__ import annotations

import importlib.util

from torch import nn


def records_are_shared(model: nn.Module) -> bool:
    """Whether two passes under way at once record into each other's outputs.

    Before 5.2 transformers records by replacing the modules' forward methods for the time of a pass; since then
    each thread has a collector of its own (`transformers.utils.output_capturing`).
    """
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return False
    return importlib.util.find_spec("transformers.utils.output_capturing") is None
