"""One weight for input embeddings and head, on two pipeline stages.

The first stage keeps the weight, the last one a copy. Both start equal; after each step both gradients are the sum of
the two, so that the same update keeps them equal (as Megatron-LM does). The copy counts in no norm, and its optimizer's
state is saved under the weight's own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeweave.parallel.adapter import UnsupportedModel


@dataclass(frozen=True)
class Tie:
    """Names of the weight (first stage) and of its copy (last stage)."""

    weight: str
    copy: str


def find_tie(model: nn.Module, units: list[nn.Module]) -> Tie | None:
    """The tie of the model's embeddings and head, None where no weight is in two of `units` (which stages may part).

    Raises:
        UnsupportedModel: a weight in two units that are no embedding and no head.
    """
    seen: dict[int, nn.Module] = {}
    tie = None
    for unit in units:
        for param in unit.parameters():
            first = seen.setdefault(id(param), unit)
            if first is unit:
                continue
            names = [name for name, one in model.named_parameters(remove_duplicate=False) if one is param]
            if type(first) is not nn.Embedding or type(unit) is not nn.Linear or len(names) != 2:
                raise UnsupportedModel(
                    f"{' and '.join(names)} are one weight in parts of {type(model).__name__} that pp puts on "
                    "different stages; they would drift. Untie them, or set pp=1."
                )
            tie = Tie(*names)
    return tie


class TiedGradients:
    """The two stages' gradients of a tied weight, summed at the end of each step.

    Attributes:
        param: this rank's weight or copy.
    """

    def __init__(self, param: nn.Parameter, peer: int, group: dist.ProcessGroup) -> None:
        self.param, self.peer, self.group = param, peer, group

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Gradients of the backward passes inside are summed; what was accumulated before them has been already."""
        before, self.param.grad = self.param.grad, None
        yield
        own = self.param.grad if self.param.grad is not None else torch.zeros_like(self.param)
        local = own.to_local() if isinstance(own, DTensor) else own
        local.add_(self._others(local.contiguous()))
        self.param.grad = own if before is None else before.add_(own)

    def _others(self, local: Tensor) -> Tensor:
        received = torch.empty_like(local)
        exchange = [
            dist.P2POp(dist.isend, local, group=self.group, group_peer=self.peer),
            dist.P2POp(dist.irecv, received, group=self.group, group_peer=self.peer),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        return received
