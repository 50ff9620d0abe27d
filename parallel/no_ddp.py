"""Other tools that would wrap a model once more: torch's DDP, which Hugging Face's Trainer and accelerate put on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def refuse_ddp(model: nn.Module) -> None:
    """Make `DistributedDataParallel(model)` a ValueError that says what to do; else it fails inside of DTensor."""
    # The one thing that DDP asks a module for before it communicates: the names that it is to leave out.
    vars(model)["_ddp_params_and_buffers_to_ignore"] = _Refusal(type(model).__name__)


class _Refusal:
    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Iterator[str]:
        raise ValueError(
            f"{self.name} is spread by moeweave already, and DistributedDataParallel (which Hugging Face's Trainer and "
            "accelerate put on) would spread it once more. Train it by mw.forward_backward in a loop of your own."
        )
