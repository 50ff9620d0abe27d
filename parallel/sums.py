"""Sums over ranks inside autograd graphs, for what every rank holds whole."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.parallel.seam import shadowed


def sum_param_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradients of the parameters that `module` itself holds over `group`, each rank's being a part."""
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Taken at the call: FSDP puts the gathered parameters in place just before.
        params = {name: SumGradient.apply(param, group) for name, param in module.named_parameters(recurse=False)}
        with shadowed(module, params):
            return own(*args, **kwargs)

    module.forward = forward


class SumGradient(torch.autograd.Function):
    """What every rank has whole and uses in part: the parts' gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SumForward(torch.autograd.Function):
    """Parts summed; the sum's gradient, which every rank has whole, is each part's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
