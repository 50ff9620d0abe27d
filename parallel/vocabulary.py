"""The loss of logits whose vocabulary is split over tp, without gathering them.

The head gives each tp rank the logits of its part of the vocabulary. Inside `forward_backward` nobody but the loss
reads them, and it needs three numbers a token from the other ranks: the largest logit, the sum of exponentials, the
label's logit (Megatron-LM, arXiv 1909.08053, section 3). Everywhere else the logits are gathered.

Legend: N labels, V vocabulary, v of this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moeweave.comm.communicator import Communicator

_split_logits: ContextVar[bool] = ContextVar("moeweave_split_logits", default=False)


@contextmanager
def split_logits() -> Iterator[None]:
    """Models whose loss can be computed from split logits keep them split inside."""
    token = _split_logits.set(True)
    try:
        yield
    finally:
        _split_logits.reset(token)


def install_vocabulary_loss(model: Any, head: nn.Module, mesh: DeviceMesh) -> None:
    """`head`, split by columns, gives whole logits, or inside `split_logits` its own, which the model's loss takes."""
    comm = Communicator(mesh.get_group())
    own = getattr(model, "loss_function", None)
    # A loss of another name might need whole logits.
    known = getattr(own, "__name__", "") == "ForCausalLMLoss"
    head.register_forward_hook(
        lambda module, args, logits: logits if known and _split_logits.get() else _Gather.apply(logits, comm)
    )
    if known:
        model.loss_function = _split_loss(own, comm)


def _split_loss(own: Any, comm: Communicator) -> Any:
    """transformers' ForCausalLMLoss, of split logits."""

    @functools.wraps(own)
    def loss_function(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not _split_logits.get():
            given = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            loss: Tensor = own(logits, labels, vocab_size, shift_labels=shift_labels, **given, **kwargs)
            return loss
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        labels_N = shift_labels.reshape(-1).to(logits.device)
        counted_N = labels_N != ignore_index
        losses_N = _CrossEntropy.apply(logits.float().flatten(0, -2), labels_N.where(counted_N, 0), comm)
        total = losses_N.where(counted_N, 0.0).sum()
        return total / (counted_N.sum() if num_items_in_batch is None else num_items_in_batch)

    return loss_function


class _CrossEntropy(torch.autograd.Function):
    """logits [N, v] of this rank's slice, labels [N] of the whole vocabulary -> losses [N], the same on every rank."""

    @staticmethod
    def forward(ctx: Any, logits_Nv: Tensor, labels_N: Tensor, comm: Communicator) -> Tensor:
        size = logits_Nv.shape[1]
        most_N = logits_Nv.amax(1)
        dist.all_reduce(most_N, op=dist.ReduceOp.MAX, group=comm.group)
        shifted_Nv = logits_Nv - most_N.unsqueeze(1)
        own_N = labels_N - comm.rank * size
        here_N = (own_N >= 0) & (own_N < size)
        own_N = own_N.clamp(0, size - 1)
        label_N = shifted_Nv.gather(1, own_N.unsqueeze(1)).squeeze(1).where(here_N, 0.0)
        exp_Nv = shifted_Nv.exp_()
        sums_2N = torch.stack([exp_Nv.sum(1), label_N])
        dist.all_reduce(sums_2N, group=comm.group)
        ctx.save_for_backward(exp_Nv.div_(sums_2N[0].unsqueeze(1)), own_N, here_N)
        return sums_2N[0].log() - sums_2N[1]

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        probs_Nv, own_N, here_N = ctx.saved_tensors
        grad_Nv = probs_Nv * grad_N.unsqueeze(1)
        grad_Nv.scatter_add_(1, own_N.unsqueeze(1), -(grad_N * here_N).unsqueeze(1))
        return grad_Nv, None, None


class _Gather(torch.autograd.Function):
    """[..., v] -> [..., V]; the gradient, which every rank has whole, is cut."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, comm: Communicator) -> Tensor:
        ctx.first, ctx.size = comm.rank * logits.shape[-1], logits.shape[-1]
        return torch.cat(list(comm.all_gather(logits)), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.first, ctx.size).contiguous(), None
