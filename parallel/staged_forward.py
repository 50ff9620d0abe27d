"""A forward without gradients of a model cut into pipeline stages, for `generate`.

Every rank of a pipeline runs the same loop of transformers over the same tokens. The rows of a forward are cut into
micro-batches (`row_parts.py`), which follow each other through the stages: a stage receives hidden states, runs its
layers, sends on, and takes the next micro-batch while the next stage has this one; the last one tells all ranks the
logits. A rank without a layer still keeps its length in the cache, which positions and masks are made of. Where ranks
share prompts (`sequence.py`), each stage hands on a rank's positions to the same rank of the next.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.parallel.data import shard_again
from moeweave.parallel.hf.attention import cache_of
from moeweave.parallel.row_parts import agree_on_parts, join_caches, split_rows

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
    """One forward through all stages: 1. its rows in parts, 2. each part on, stage by stage, 3. everyone's logits."""
    given = _arguments(own, args, kwargs)
    if given.get("input_ids") is None:
        raise ValueError("generate under pp needs input_ids: hidden states are received in their shape.")
    if pipeline.takes_router_logits:
        given["output_router_logits"] = False
    parts = split_rows(given, agree_on_parts(given, pipeline.layout.pp, pipeline.record.mesh))
    outputs: list[Any] = [None] * len(parts)
    hidden: list[Tensor | None] = [None] * len(parts)
    sending: list[tuple[dist.Work | None, Tensor]] = []
    for stage in pipeline.layout.stages_of(pipeline.record.mesh.dense.get_local_rank("pp")):
        for index, part in enumerate(parts):
            received = _receive(pipeline, stage, part, hidden[index])
            outputs[index], hidden[index] = _run_stage(pipeline, stage, own, part, received)
            # Not waited for: the next part is computed while the next stage has this one.
            sending += _send(pipeline, stage, hidden[index])
    for work, _ in sending:
        if work is not None:
            work.wait()
    output = outputs[0]
    output.logits = _everyones_logits(pipeline, torch.cat([each.logits for each in outputs]))
    if len(parts) > 1 and (cache := join_caches(cache_of(given), parts)) is not None:
        setattr(output, "cache" if getattr(output, "cache", None) is not None else "past_key_values", cache)
    return output


def _arguments(own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = dict(inspect.signature(own).bind_partial(*args, **kwargs).arguments)
    further: dict[str, Any] = given.pop("kwargs", {})
    return given | further


def _run_stage(
    pipeline: Pipeline, stage: int, own: Any, given: dict[str, Any], received: Tensor | None
) -> tuple[Any, Tensor | None]:
    """(output of the model's forward, hidden states for the next stage) of one part."""
    border = pipeline.cut.border
    border.received = received
    with pipeline.cut.viewing(stage):
        output = own(**given)
    sent, border.received, border.sent = border.sent, None, None
    return output, sent


def _send(pipeline: Pipeline, stage: int, hidden: Tensor | None) -> list[tuple[dist.Work | None, Tensor]]:
    """Begin to send to the next stage's rank, if that is another; the memory is to be kept until it is done."""
    layout = pipeline.layout
    own = pipeline.record.mesh.dense.get_local_rank("pp")
    if stage == layout.num_stages - 1 or layout.rank_of(stage + 1) == own:
        return []
    assert hidden is not None
    hidden = hidden.contiguous()
    return [(dist.isend(hidden, group=_group(pipeline), group_dst=layout.rank_of(stage + 1)), hidden)]


def _receive(pipeline: Pipeline, stage: int, given: dict[str, Any], own: Tensor | None) -> Tensor | None:
    """Hidden states [B, s, D] of the stage before, of this rank's positions; `own` where this rank has that one too."""
    if stage == 0:
        return None
    source = pipeline.layout.rank_of(stage - 1)
    if source == pipeline.record.mesh.dense.get_local_rank("pp"):
        return own
    sharing, ids = pipeline.record.sequence, given["input_ids"]
    span = None if sharing is None else sharing.begin(given, pipeline.record)
    held = ids.shape[1] if span is None else span.held
    hidden = torch.empty(ids.shape[0], held, pipeline.width, dtype=pipeline.dtype, device=ids.device)
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
