"""A forward without gradients of a model cut into pipeline stages, for `generate`.

Every rank of a pipeline runs the same loop of transformers over the same tokens. Each forward goes through the stages
in turn: a stage receives hidden states, runs its layers, sends on; the last one tells all ranks the logits. A rank
without a layer still keeps its length in the cache, which positions and masks are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.parallel.data import shard_again

if TYPE_CHECKING:
    from moeweave.parallel.pipeline import Pipeline


@contextmanager
def generating(pipeline: Pipeline) -> Iterator[None]:
    """`model(...)` is a forward through all stages inside."""
    model: Any = pipeline.model
    own, before = model.forward, vars(model).get("forward")

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _through_stages(pipeline, own, args, kwargs)

    vars(model)["forward"] = forward
    pipeline.generating = True
    try:
        yield
    finally:
        pipeline.generating = False
        if before is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = before
        shard_again(model)


def keeps_cache(pipeline: Pipeline) -> bool:
    """Whether stages can keep keys and values: one stage a rank, and layers that all have some."""
    model: Any = pipeline.model
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    attention = all("attention" in kind and "linear" not in kind for kind in kinds)
    return attention and pipeline.layout.num_stages == pipeline.layout.pp


def _through_stages(pipeline: Pipeline, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout, border = pipeline.layout, pipeline.cut.border
    rank = pipeline.record.mesh.dense.get_local_rank("pp")
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError("generate under pp needs input_ids: hidden states are received in their shape.")
    if pipeline.takes_router_logits:
        kwargs["output_router_logits"] = False
    output: Any = None
    sent: Tensor | None = None
    for stage in layout.stages_of(rank):
        border.received = _receive(pipeline, stage, ids, sent)
        with pipeline.cut.viewing(stage):
            output = own(*args, **kwargs)
        sent, border.received, border.sent = border.sent, None, None
        if stage < layout.num_stages - 1 and layout.rank_of(stage + 1) != rank:
            assert sent is not None
            dist.send(sent.contiguous(), group=_group(pipeline), group_dst=layout.rank_of(stage + 1))
    output.logits = _everyones_logits(pipeline, output.logits)
    return output


def _receive(pipeline: Pipeline, stage: int, ids: Tensor, own: Tensor | None) -> Tensor | None:
    """Hidden states [B, S, D] of the stage before; `own` where this rank has that one too."""
    if stage == 0:
        return None
    source = pipeline.layout.rank_of(stage - 1)
    if source == pipeline.record.mesh.dense.get_local_rank("pp"):
        return own
    hidden = torch.empty(*ids.shape, pipeline.width, dtype=pipeline.dtype, device=ids.device)
    dist.recv(hidden, group=_group(pipeline), group_src=source)
    return hidden


def _everyones_logits(pipeline: Pipeline, logits: Tensor) -> Tensor:
    """The last stage's logits on every rank, float32 as `generate` takes them."""
    layout = pipeline.layout
    last = layout.rank_of(layout.num_stages - 1)
    shape = torch.tensor(logits.shape, device=logits.device)
    dist.broadcast(shape, group=_group(pipeline), group_src=last)
    if pipeline.record.mesh.dense.get_local_rank("pp") != last:
        logits = torch.empty(shape.tolist(), device=logits.device)
    logits = logits.float().contiguous()
    dist.broadcast(logits, group=_group(pipeline), group_src=last)
    return logits


def _group(pipeline: Pipeline) -> dist.ProcessGroup:
    return pipeline.record.mesh.group("pp")
