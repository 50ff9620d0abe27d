"""One true loss over ranks with different batches.

Hugging Face models average over the labels of the batch they are given. Over ranks it must be the global batch's: the
sum over a rank's labels is divided by the mean number of labels a rank (`global_tokens`, as `num_items_in_batch`), so
that the mean over ranks is the mean over all labels. Their balance loss is made global in `aux_loss.py`.

Legend: B sequences, S positions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.parallel.aux_loss import balances, check_output, global_aux_loss, sum_over_ranks, sums_over_ranks
from moeweave.parallel.data_deepspeed_config import check_accumulation
from moeweave.parallel.microbatch import agree_on_lanes, run_passes
from moeweave.parallel.record import Record, record_of
from moeweave.parallel.span import Span, current_span
from moeweave.parallel.vocabulary import split_logits

IGNORED_LABEL = -100
# transformers' losses that are means over labels: whether position s holds its own label (True) or s + 1 its (False).
_LABEL_LOSSES = {
    "ForCausalLM": False,
    "ForConditionalGeneration": False,
    "ForMaskedLM": True,
    "ForTokenClassification": True,
}


# The labels of the step under way and its number of micro-batches, while `forward_backward` runs more than one.
_whole_step: ContextVar[tuple[Tensor, int] | None] = ContextVar("moeweave_step", default=None)
# Under pp the last stage alone computes a loss, so what `global_tokens` answers is agreed on before the step.
_known_tokens: ContextVar[dict[bool, Tensor] | None] = ContextVar("moeweave_tokens", default=None)


def _is_part_of(labels: Tensor, whole: Tensor) -> bool:
    same_memory = labels.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return same_memory and labels.shape[1:] == whole.shape[1:]


def global_tokens(labels: Tensor, *, shifted: bool = False) -> Tensor:
    """What a sum over this rank's labels is divided by: the mean over all ranks of the number of labels that count.

    With this denominator the mean of the ranks' losses, which is what data parallelism optimises, is the mean over all
    labels of the global batch. Collective: every rank calls it. Inside `forward_backward(..., microbatches=m)` a
    micro-batch's labels (as they came, or a view of the same width) give the count of the whole batch over m, so
    that the mean of the m losses is the whole batch's loss.

    Args:
        labels: int64 [B, S], -100 where there is nothing to predict.
        shifted: True if position s holds the label of position s; False (as Hugging Face has it) if the model predicts
            labels[:, 1:].

    Returns:
        float32 scalar, at least 1 / ranks.
    """
    known = _known_tokens.get()
    if known is not None:
        return known[shifted]
    step = _whole_step.get()
    parts = 1
    if step is not None and _is_part_of(labels, step[0]):
        labels, parts = step
    counted = labels if shifted else labels[..., 1:]
    count = (counted != IGNORED_LABEL).sum().to(torch.float32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1.0 / (dist.get_world_size() if dist.is_initialized() else 1)) / parts


def forward_backward(model: nn.Module, batch: dict[str, Any], microbatches: int = 1) -> Tensor:
    """Forward and backward of one batch on every mesh and engine; gradients accumulate in `.grad`.

    Args:
        model: from `parallelize`. Its forward takes `batch` as keywords and returns a loss, or an object with `.loss`.
        batch: this rank's part; tensors share dim 0, which is split into the micro-batches.
        microbatches: parts to run one after the other; `Plan.grad_sync` says when gradients are reduced. With
            Plan(overlap="microbatch") each is cut into `Plan.microbatches` more, which run in turns.

    Returns:
        The global loss, detached: the mean over data ranks.

    Raises:
        ValueError: fewer rows than micro-batches. TypeError: the batch is no mapping, or the model returned no loss.
    """
    record = record_of(model)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch ({type(batch).__name__}) must be a dict of what forward takes, such as {{'input_ids': ..., "
            "'labels': ...}."
        )
    if record.pipeline is not None:
        record.grad_sync.hold()
        piped: Tensor = record.pipeline.forward_backward(batch, microbatches)
        return piped
    lanes = agree_on_lanes(batch, microbatches, record)
    microbatches *= lanes
    parts = split(batch, microbatches)
    runner = _runner(model, record, microbatches)
    extra: dict[str, Any] = {}
    summed = record.takes_num_items and batch.get("num_items_in_batch") is not None
    if microbatches > 1 and record.takes_num_items and not summed:
        num_items = _num_items(batch, record)
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        summed = num_items is not None
    share = 1.0 if summed else 1.0 / microbatches
    record.aux_share = 1.0 / microbatches if summed else 1.0
    for layer in record.layers:
        layer.aux_share = 1.0 / microbatches
    labels = batch.get("labels")
    step = _whole_step.set((labels, microbatches) if isinstance(labels, Tensor) and microbatches > 1 else None)
    passes = [functools.partial(_part_of_loss, runner, {**part, **extra}, share) for part in parts]
    try:
        total = run_passes(model, passes, lanes, record) if record.zero is None else record.zero.run(passes)
    finally:
        _whole_step.reset(step)
        record.num_items = None
        record.aux_share = 1.0
        for layer in record.layers:
            layer.aux_share = 1.0
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return total


def _part_of_loss(model: nn.Module, part: dict[str, Any], share: float) -> Tensor:
    with split_logits():
        return loss_of(model(**part)) * share


def _runner(model: nn.Module, record: Record, microbatches: int) -> nn.Module:
    """What runs the model's forward: itself, or the engine that has it."""
    if record.plan.zero_stage is None:
        return model
    if record.zero is None:
        raise RuntimeError(
            f"Plan(data={record.plan.data!r}) trains with DeepSpeed's engine. Make it first: "
            "optimizer = mw.prepare_optimizer(model, optimizer)."
        )
    check_accumulation(record.plan, microbatches)
    engine: nn.Module = record.zero.engine
    return engine


def loss_of(output: Any) -> Tensor:
    """The scalar loss in what a model returned."""
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"The model returned {type(output).__name__} without a scalar loss. Pass labels in the batch, or let "
            "forward return the loss or an object with .loss."
        )
    return loss


def begin_step(labels: Tensor, parts: int, known: dict[bool, Tensor]) -> Any:
    """Until `end_step`, `global_tokens` answers `known` without communication."""
    return _whole_step.set((labels, parts)), _known_tokens.set(known)


def end_step(tokens: Any) -> None:
    """Undo `begin_step`."""
    _whole_step.reset(tokens[0])
    _known_tokens.reset(tokens[1])


def labels_optional(model: nn.Module) -> bool:
    """True if the model's forward runs without labels."""
    found = inspect.signature(model.forward).parameters.get("labels")
    return found is None or found.default is not found.empty


def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    if parts == 1:
        return [batch]
    rows = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    if len(rows) > 1:
        sizes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
        raise ValueError(
            f"microbatches ({parts}) split dim 0, and the batch's tensors differ in it: {sizes}. Put the batch first "
            "in all of them, or use microbatches=1."
        )
    if parts < 1 or any(n < parts for n in rows):
        raise ValueError(
            f"microbatches ({parts}) must be between 1 and the rows of the batch ({min(rows, default=0)})."
        )
    pieces = {
        name: value.tensor_split(parts) if isinstance(value, Tensor) and value.dim() else [value] * parts
        for name, value in batch.items()
    }
    return [{name: piece[index] for name, piece in pieces.items()} for index in range(parts)]


def install_loss_hooks(model: nn.Module, record: Record) -> None:
    """Make `model(**batch).loss` the rank's share of the global loss."""
    forward = inspect.signature(model.forward)
    loss_type = getattr(model, "loss_type", None)
    record.takes_num_items = hasattr(model, "loss_function") and any(
        p.kind is p.VAR_KEYWORD or name == "num_items_in_batch" for name, p in forward.parameters.items()
    )
    if loss_type is not None:
        # A loss over rows (classes of a sequence) is a mean over equal batches already.
        record.takes_num_items &= loss_type in _LABEL_LOSSES
        record.labels_shifted = _LABEL_LOSSES.get(loss_type, False)
    if record.takes_num_items:
        _hand_over_num_items(model, record)
    if sums_over_ranks(record):
        for layer in record.layers:
            layer.reduce = functools.partial(sum_over_ranks, record=record)
    # Not by decorators, which would import Dynamo together with this module.
    hold = torch.compiler.disable(record.grad_sync.hold, reason="hooks of parameters are put on outside of graphs")
    reason = "torch 2.11's Dynamo loses part of the gradient of the sum over ranks"
    global_loss = torch.compiler.disable(global_aux_loss, reason=reason)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hold()
        record.num_items = kwargs.get("num_items_in_batch")
        record.balanced = False
        if record.mesh.loss_size == 1 or not record.takes_num_items or record.num_items is not None:
            return args, kwargs
        given = forward.bind_partial(*args, **kwargs).arguments
        record.num_items = _num_items({**given, **given.get("kwargs", {})}, record)
        return args, kwargs if record.num_items is None else {**kwargs, "num_items_in_batch": record.num_items}

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        record.num_items = None
        given = forward.bind_partial(*args, **kwargs).arguments
        return _with_global_aux(model, {**given, **given.get("kwargs", {})}, output, record, global_loss)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)


def _with_global_aux(
    model: nn.Module, given: dict[str, Any], output: Any, record: Record, global_loss: Callable[..., Tensor]
) -> Any:
    """The output of `model(**given)`, its balance loss made the global batch's, by `global_aux_loss`, if the plan says
    so."""
    if sums_over_ranks(record) and balances(model, given):
        check_output(output)
    aux_local = getattr(output, "aux_loss", None)
    if not isinstance(aux_local, Tensor) or record.balanced:
        return output
    aux = aux_local
    if sums_over_ranks(record):
        if not getattr(output, "router_logits", None):
            raise ValueError(
                f"Plan.aux ('global') needs the router logits of the step, and {type(model).__name__} returned an "
                "aux_loss without them. Use Plan(aux='rank') to keep the model's own, per rank."
            )
        aux = global_loss(output.router_logits, aux_local, given.get("attention_mask"), record)
    if output.loss is not None:
        output.loss = output.loss + record.aux_coef * (aux * record.aux_share - aux_local)
    output.aux_loss = aux
    return output


def _num_items(batch: dict[str, Any], record: Record) -> Tensor | None:
    """`global_tokens` of the labels in a batch; None without labels."""
    labels = batch.get("shift_labels", batch.get("labels"))
    if labels is None:
        return None
    return global_tokens(labels, shifted=record.labels_shifted or "shift_labels" in batch)


def _hand_over_num_items(model: Any, record: Record) -> None:
    """Give `num_items_in_batch` to the loss of models whose forward takes it and does not pass it on, as several do."""
    own = model.loss_function
    takes = inspect.signature(own).parameters
    if "num_items_in_batch" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return

    names = list(takes)

    @functools.wraps(own)
    def loss_function(*args: Any, **kwargs: Any) -> Any:
        if record.num_items is not None and kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = record.num_items
        span = current_span()
        if span is None or span.joined or span.sp.comm.size == 1:
            return own(*args, **kwargs)
        return own(**_of_shard({**dict(zip(names, args, strict=False)), **kwargs}, span, record))

    model.loss_function = loss_function
    record.splits_loss = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


def _of_shard(given: dict[str, Any], span: Span, record: Record) -> dict[str, Any]:
    """Arguments of a loss whose logits are a shard's: the labels that its positions predict, and the mean number of
    labels over the ranks among which the whole sequence's are shared out."""
    shifted = given.get("shift_labels")
    if record.labels_shifted:
        given["labels"] = span.sp.take(given["labels"], 1)
    else:
        if shifted is None:
            shifted = nn.functional.pad(given["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
        given["shift_labels"] = span.sp.take(shifted, 1)
    given["num_items_in_batch"] = given["num_items_in_batch"] / span.sp.comm.size
    return given
