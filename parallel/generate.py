"""`generate` over ranks whose sequences end at different times.

Every forward of the model is a step that all ranks take together (they serve each other's experts and shards). A rank
that is done keeps taking part: it runs a forward of one token that is routed nowhere, so that it sends no row and
computes only what the others send it, until all ranks are done.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moeweave.parallel.record import Record


def install_lockstep(model: nn.Module, record: Record) -> None:
    """Replace `model.generate`, where there is one, by one that ends on all ranks together."""
    own = getattr(model, "generate", None)
    if own is None or record.mesh.world == 1:
        return

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        # transformers' own lock step would compute dummy tokens through the experts, and needs equal kinds of calls.
        kwargs["synced_gpus"] = False
        voting = model.register_forward_pre_hook(lambda *_: _any_active(True, record), prepend=True)
        try:
            with _named_by_its_source(type(model)):
                generated = own(*args, **kwargs)
        finally:
            voting.remove()
        _serve_until_all_done(model, record)
        return generated

    vars(model)["generate"] = generate


@contextmanager
def _named_by_its_source(wrapper: type[nn.Module]) -> Iterator[None]:
    """generate reads the source file of the model's class; FSDP and DDP have put a class of their own on top."""
    module = wrapper.__module__
    if module.startswith("torch."):
        wrapper.__module__ = next(cls.__module__ for cls in wrapper.__mro__ if not cls.__module__.startswith("torch."))
    try:
        yield
    finally:
        wrapper.__module__ = module


def _any_active(active: bool, record: Record) -> bool | None:
    """True while some rank still generates. As a forward hook its return value must be None: nothing changes then."""
    votes = torch.tensor(float(active), device=record.mesh.device)
    dist.all_reduce(votes)
    return None if active else bool(votes > 0)


@torch.no_grad()
def _serve_until_all_done(model: nn.Module, record: Record) -> None:
    token = torch.zeros(1, 1, dtype=torch.int64, device=record.mesh.device)
    for call in record.calls:
        call.masked = True
    try:
        while _any_active(False, record):
            model(input_ids=token, use_cache=False)
    finally:
        for call in record.calls:
            call.masked = False
