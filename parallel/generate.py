"""`generate` over ranks whose sequences end at different times.

Every forward of the model is a step that all ranks take together (they serve each other's experts and shards). A rank
that is done keeps taking part: it runs a forward of one token (a micro-batch, under pp) that is routed nowhere, so
that it sends no row and computes only what the others send it, until all ranks are done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.parallel.data import shard_again
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.record import Record
from moeweave.parallel.staged_forward import generating, keeps_cache


def install_lockstep(model: nn.Module, record: Record) -> None:
    """Replace `model.generate`, where there is one, by one that ends on all ranks together."""
    own = getattr(model, "generate", None)
    if own is None or record.mesh.world == 1:
        return

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        # transformers' own lock step would compute dummy tokens through the experts, and needs equal kinds of calls.
        kwargs["synced_gpus"] = False
        pipeline = record.pipeline
        if pipeline is not None and not keeps_cache(pipeline):
            kwargs["use_cache"] = False
        with generating(pipeline) if pipeline is not None else nullcontext():
            voting = model.register_forward_pre_hook(lambda *_: _any_active(True, record), prepend=True)
            record.generating = True
            try:
                try:
                    with _named_by_its_source(type(model)), _one_stream_of_numbers(record.mesh):
                        generated = own(*args, **kwargs)
                finally:
                    voting.remove()
                # Ranks that still generate and those that serve them must gather the same parameters.
                _serve_until_all_done(model, record)
            finally:
                record.generating = False
            shard_again(model)
        return generated

    vars(model)["generate"] = generate


@contextmanager
def _one_stream_of_numbers(mesh: Mesh) -> Iterator[None]:
    """Ranks that share a batch (tp, sp, pp) sample the same tokens: by the random numbers of the first of them."""
    axes = [axis for axis in ("tp", "sp", "pp") if getattr(mesh.sizes, axis) > 1]
    first = all(mesh.dense.get_local_rank(axis) == 0 for axis in axes)
    with torch.random.fork_rng(devices=_devices(mesh), device_type=mesh.device.type, enabled=not first):
        for get, put in _generators(mesh):
            state = get().to(mesh.device)
            for axis in axes:
                dist.broadcast(state, group=mesh.group(axis), group_src=0)
            put(state.cpu())
        yield


def _generators(mesh: Mesh) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """Read and set the state of the CPU's generator, and of the device's."""
    found: list[tuple[Any, Any]] = [(torch.get_rng_state, torch.set_rng_state)]
    if mesh.device.type != "cpu":
        module = getattr(torch, mesh.device.type)
        found.append((module.get_rng_state, module.set_rng_state))
    return found


def _devices(mesh: Mesh) -> list[int]:
    return [] if mesh.device.type == "cpu" else [mesh.device.index]


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
    # A row for each micro-batch that ranks still generating may cut their rows into.
    token = torch.zeros(record.mesh.sizes.pp, 1, dtype=torch.int64, device=record.mesh.device)
    for call in record.calls:
        call.masked = True
    try:
        while _any_active(False, record):
            model(input_ids=token, use_cache=False)
    finally:
        for call in record.calls:
            call.masked = False
