"""How transformers records router logits and hidden states while a model runs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import nn


def records_are_shared(model: nn.Module) -> bool:
    """Whether two passes under way at once record into each other's outputs.

    Before 5.2 transformers records by replacing the modules' forward methods for the time of a pass; since then
    each thread has a collector of its own (`transformers.utils.output_capturing`).
    """
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return False
    return importlib.util.find_spec("transformers.utils.output_capturing") is None


def keep_recording(model: nn.Module) -> None:
    """Let `output_hidden_states` and `output_router_logits` of a wrapped model record as before.

    transformers looks up what a model records by the name of its class, and FSDP and DDP have put one of theirs on top.
    """
    recording = [module for module in model.modules() if getattr(module, "_can_record_outputs", None)]
    if not recording:
        return
    newer = importlib.util.find_spec("transformers.utils.output_capturing") is not None
    home: Any = importlib.import_module(f"transformers.utils.{'output_capturing' if newer else 'generic'}")
    for module in recording:
        # dict's own: newer releases have one that is keyed on models.
        dict.__setitem__(home._CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)
