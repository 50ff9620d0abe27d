"""One true loss over ranks with different batches.

Hugging Face models average over the labels of the batch they are given, and balance experts over its tokens. Over data
ranks both must mean the global batch:

    loss      the sum over a rank's labels, divided by the mean number of labels a rank (`global_tokens`, passed as
              `num_items_in_batch`), so that the mean over ranks is the mean over all labels
    aux loss  expert counts and probabilities summed over data ranks before they are multiplied

Legend: B sequences, S positions, T tokens here, E experts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.parallel.data import no_sync
from moeweave.parallel.record import Record, record_of
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
        microbatches: parts to run one after the other; gradients are reduced over ranks with the last.

    Returns:
        The global loss, detached: the mean over data ranks.

    Raises:
        ValueError: fewer rows than micro-batches. TypeError: the model returned no loss.
    """
    record = record_of(model)
    if record.pipeline is not None:
        total: Tensor | None = record.pipeline.forward_backward(batch, microbatches)
        assert total is not None
        return total
    parts = split(batch, microbatches)
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
    total = None
    labels = batch.get("labels")
    step = _whole_step.set((labels, microbatches) if isinstance(labels, Tensor) and microbatches > 1 else None)
    try:
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with split_logits():
                loss = loss_of(model(**part, **extra)) * share
            if last:
                loss.backward()
            else:
                with no_sync(model):
                    loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
    finally:
        _whole_step.reset(step)
        record.num_items = None
        record.aux_share = 1.0
        for layer in record.layers:
            layer.aux_share = 1.0
    assert total is not None
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return total


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


def balances(model: nn.Module, batch: dict[str, Any]) -> bool:
    """True if `model(**batch)` adds transformers' load-balancing loss to its own."""
    if "output_router_logits" not in inspect.signature(model.forward).parameters:
        return False
    asked = batch.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if asked is None else asked)


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
    if record.mesh.data_size > 1 and record.plan.aux == "global":
        for layer in record.layers:
            layer.reduce = functools.partial(_sum_over_data, group=record.mesh.data_group)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        record.num_items = kwargs.get("num_items_in_batch")
        if record.mesh.data_size == 1 or not record.takes_num_items or record.num_items is not None:
            return args, kwargs
        given = forward.bind_partial(*args, **kwargs).arguments
        record.num_items = _num_items({**given, **given.get("kwargs", {})}, record)
        return args, kwargs if record.num_items is None else {**kwargs, "num_items_in_batch": record.num_items}

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        record.num_items = None
        aux_local = getattr(output, "aux_loss", None)
        if not isinstance(aux_local, Tensor):
            return output
        aux = aux_local
        if record.plan.aux == "global" and record.mesh.data_size > 1:
            if not getattr(output, "router_logits", None):
                raise ValueError(
                    f"Plan.aux ('global') needs the router logits of the step, and {type(model).__name__} returned an "
                    "aux_loss without them. Use Plan(aux='rank') to keep the model's own, per rank."
                )
            given = forward.bind_partial(*args, **kwargs).arguments
            mask = {**given, **given.get("kwargs", {})}.get("attention_mask")
            aux = global_aux_loss(output.router_logits, aux_local, mask, record)
        if output.loss is not None:
            output.loss = output.loss + record.aux_coef * (aux * record.aux_share - aux_local)
        output.aux_loss = aux
        return output

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)


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

    @functools.wraps(own)
    def loss_function(*args: Any, **kwargs: Any) -> Any:
        if record.num_items is not None and kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = record.num_items
        return own(*args, **kwargs)

    model.loss_function = loss_function


@torch.compiler.disable(reason="torch 2.11's Dynamo loses part of the gradient of the sum over ranks")
def global_aux_loss(logits: tuple[Tensor, ...], aux_local: Tensor, mask: Tensor | None, record: Record) -> Tensor:
    """Load-balancing loss of the global batch, equal on every data rank.

    Switch Transformer's (arXiv 2101.03961, equations 4-6), as transformers computes it: num_experts times the sum over
    experts of (share of tokens with the expert among their top k) * (mean probability), layers taken together.

    Args:
        logits: router logits [T, E] of each layer. mask: attention mask [B, S] with B * S = T, or None.
        aux_local: what the model computed from this rank's tokens; checked against the formula at the first call.
    """
    num_experts = logits[0].shape[-1]
    sums = balance_sums(logits, mask, record.top_k, logits[0].new_zeros(2 * num_experts + 1, dtype=torch.float32))
    if not record.aux_checked:
        _check_formula(_switch_loss(sums), aux_local, logits[0].dtype, record)
        record.aux_checked = True
    return balance_loss(sums, record)


def balance_sums(logits: Iterable[Tensor], mask: Tensor | None, top_k: int, before: Tensor) -> Tensor:
    """`before` plus what the load-balancing loss needs of layers: routes [E], probability [E] and rows [1], in one.

    Args:
        logits: router logits [T, E] of each layer. mask: attention mask [B, S] with B * S = T, or None.
        before: [2 E + 1] of the layers so far.
    """
    flat = None if mask is None or mask.dim() != 2 else mask.reshape(-1).to(torch.float32)
    for layer_TE in logits:
        probs_TE = torch.softmax(layer_TE, dim=-1)
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.float32).scatter_(
            1, torch.topk(probs_TE, top_k, dim=-1).indices, 1.0
        )
        kept = flat if flat is not None and flat.numel() == layer_TE.shape[0] else None
        probs_TE = probs_TE.float()
        rows = before.new_full((1,), layer_TE.shape[0])
        if kept is not None:
            chosen_TE, probs_TE = chosen_TE * kept.unsqueeze(1), probs_TE * kept.unsqueeze(1)
            rows = kept.sum().reshape(1)
        before = before + torch.cat([chosen_TE.sum(0), probs_TE.sum(0), rows])
    return before


def balance_loss(sums: Tensor, record: Record) -> Tensor:
    """The loss of `balance_sums`, those of all data ranks together if the plan says so."""
    if record.plan.aux == "global" and record.mesh.data_size > 1:
        sums = _SumOverData.apply(sums, record)
    return _switch_loss(sums)


def _switch_loss(sums: Tensor) -> Tensor:
    num_experts = sums.numel() // 2
    counts_E, probs_E, rows = sums[:num_experts].detach(), sums[num_experts:-1], sums[-1].detach()
    return num_experts * (counts_E * probs_E).sum() / rows**2


def _check_formula(formula: Tensor, aux_local: Tensor, dtype: torch.dtype, record: Record) -> None:
    """Raise on every data rank if on one of them the model's loss is another than the formula's."""
    ours, model = float(formula.detach()), float(aux_local.detach())
    # Some releases average bf16 probabilities in bf16.
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2
    differs = torch.tensor(float(abs(ours - model) > tolerance * max(abs(model), 1e-6)), device=formula.device)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=record.mesh.data_group)
    if differs:
        raise ValueError(
            f"Plan.aux ('global') needs the load-balancing loss of Switch Transformer: from the router logits it is "
            f"{ours:.6g} here, this model reports {model:.6g}. Use Plan(aux='rank') to keep the model's own, per rank."
        )


def _sum_over_data(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


class _SumOverData(torch.autograd.Function):
    """Sum over data ranks. Every rank's loss holds the same global term, so its gradient is the same on every rank, and
    the sum over them that an all-reduce would need is a multiplication."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, record: Record) -> Tensor:
        ctx.data_size = record.mesh.data_size
        return _sum_over_data(x, record.mesh.data_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.data_size, None
