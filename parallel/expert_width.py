"""Expert tensor parallelism: every expert's width split over the mesh axis `etp`.

Ranks of an etp group hold the same experts, each some of their columns. A call of the experts gathers the group's
tokens, each rank computes its part of every output, and the parts are summed on the tokens' own ranks:

    1. gather     tokens, ids and weights of the group
    2. experts    of all of them, on this rank's columns (dispatch and combine over `ep` inside)
    3. reduce     the sum of the parts, of this rank's own tokens

Gate and up packed one after the other are split separately, so that a rank's columns of both belong together; gate and
up that alternate are split in blocks. Which of the two it is, the model's own activation is asked. Biases stay whole;
those of the outputs are added by one rank. A norm of the outputs needs whole ones: they are summed row by row before.

Worked example, etp=2, I=4, gate and up packed in rows g0 g1 g2 g3 u0 u1 u2 u3: rank 0 holds g0 g1 u0 u1.

Legend: T tokens here, t tokens of the group, D width, R rows of experts, I hidden width of an expert, e experts of this
rank, F columns of the first projection (f of this rank).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from moeweave.comm.communicator import Communicator
from moeweave.parallel.adapter import MoEBlock, UnsupportedModel, is_gated


def width_of(block: MoEBlock) -> int:
    """Hidden width I of a packed block's experts."""
    down: Tensor = block.experts.get_parameter("down_proj")
    return down.shape[1 if block.experts.is_transposed else 2]


def check_width(block: MoEBlock, etp: int, edp: int) -> None:
    """Raise unless the experts of `block` can be split over `etp` ranks, with `edp` copies; legal sizes are listed.

    Raises:
        UnsupportedModel: experts of another kind than "packed", or an activation that is not column by column.
        ValueError: columns that `etp` does not divide, rows that `edp` does not divide.
    """
    if block.kind != "packed":
        raise UnsupportedModel(
            f"{block.path} ({type(block.experts).__name__}) does not say how its experts' weights are laid out, so etp "
            f"({etp}) cannot split them. Set etp=1 and use the ranks for ep."
        )
    width = width_of(block)
    if width % etp:
        legal = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ValueError(f"etp ({etp}) must divide the columns of {block.path} ({width}). etp can be {legal}.")
    dim = block.experts.get_parameter("down_proj").shape[2 if block.experts.is_transposed else 1]
    if dim % edp:
        raise ValueError(
            f"with etp ({etp}) the width of the model at {block.path} ({dim}) must divide over the copies of its "
            f"experts, dp * sp * tp / (ep * etp) = {edp}. Choose ep or dp such that it does, or set etp=1."
        )
    columns_of(block, etp)


def placements_of(block: MoEBlock, etp: int) -> dict[str, Placement]:
    """How each parameter of the experts lies on the axis `etp`: weights by columns, biases whole."""
    experts: Any = block.experts
    up = "gate_up_proj" if is_gated(experts) else "up_proj"
    columns = columns_of(block, etp)
    rows = 1 if experts.is_transposed else 2
    found: dict[str, Placement] = {name: Replicate() for name in block.params}
    found[up] = columns(2 if experts.is_transposed else 1)
    found["down_proj"] = Shard(rows)
    return found


def columns_of(block: MoEBlock, etp: int) -> Callable[[int], Placement]:
    """The placement of the first projection's columns, as a function of their dim: the one under which this model's
    activation of a rank's columns is the rank's part of the activation of all."""
    experts: Any = block.experts
    if not is_gated(experts):
        return Shard
    width = width_of(block)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, 2 * width, generator=generator)
    try:
        with torch.no_grad():
            want = experts._apply_gate(probe).tensor_split(etp, dim=-1)
            halves = [part.tensor_split(etp, dim=-1) for part in probe.chunk(2, dim=-1)]
            apart = [torch.cat([half[rank] for half in halves], dim=-1) for rank in range(etp)]
            for cut, placement in ((apart, _apart), (probe.tensor_split(etp, dim=-1), Shard)):
                got = [experts._apply_gate(part) for part in cut]
                if all(torch.allclose(a, b) for a, b in zip(got, want, strict=True)):
                    return placement
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"{block.path}: its activation cannot be tried ({error}), as etp ({etp}) must. Set etp=1."
        ) from error
    raise UnsupportedModel(
        f"{block.path} ({type(experts).__name__}) has an activation that is not column by column, which etp ({etp}) "
        "cannot split. Set etp=1."
    )


def _apart(dim: int) -> Placement:
    return _StridedShard(dim, split_factor=2)


def slice_of(tensor: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """The part of `tensor` that `rank` of `size` holds."""
    if isinstance(placement, Replicate):
        return tensor
    dim = placement.dim  # type: ignore[attr-defined]
    halves = tensor.chunk(2, dim=dim) if isinstance(placement, _StridedShard) else (tensor,)
    return torch.cat([half.tensor_split(size, dim=dim)[rank] for half in halves], dim=dim)


class ExpertWidth:
    """The ranks that share each expert's width, and what they exchange around a call of the experts.

    Attributes:
        whole_rows: outputs are summed row by row inside the experts (`sum_rows`), because a norm follows.
    """

    def __init__(self, group: dist.ProcessGroup, block: MoEBlock) -> None:
        self.comm = Communicator(group)
        self.whole_rows = bool(getattr(block.experts, "has_post_expert_norm", False))
        self.columns = columns_of(block, self.comm.size)(1)

    def sizes(self, x_TD: Tensor) -> list[int]:
        """Tokens of each rank of the group."""
        count = torch.tensor([x_TD.shape[0]], device=x_TD.device)
        sizes: list[int] = self.comm.all_gather(count).flatten().tolist()
        return sizes

    def gather(self, x_TD: Tensor, sizes: list[int]) -> Tensor:
        """[T, ...] -> [t, ...]; the gradient, of which each rank has a part, is summed."""
        return _Gather.apply(x_TD, sizes, self.comm, True)

    def gather_weights(self, weights_TK: Tensor, sizes: list[int]) -> Tensor:
        """[T, K] -> [t, K]; their gradient comes of outputs, which are parts, or with `whole_rows` whole."""
        return _Gather.apply(weights_TK, sizes, self.comm, not self.whole_rows)

    def reduce(self, y_tD: Tensor, sizes: list[int]) -> Tensor:
        """[t, D], a part of every output -> [T, D], this rank's own outputs; the gradient is gathered."""
        return _Reduce.apply(y_tD, sizes, self.comm, not self.whole_rows)

    def sum_rows(self, rows_RD: Tensor) -> Tensor:
        """The sum of the group's parts, on every rank; each part's gradient is the sum's."""
        return _SumRows.apply(rows_RD, self.comm)

    def own_columns(self, bias_eF: Tensor) -> Tensor:
        """This rank's columns of a bias of the first projection, which every rank has whole, as is its gradient."""
        return _OwnColumns.apply(bias_eF, self)

    def once(self, bias: Tensor) -> Tensor:
        """`bias` on the group's first rank, zeros elsewhere; every rank has the whole gradient."""
        return _Once.apply(bias, self.comm.rank == 0)


def _gather(x: Tensor, sizes: list[int], comm: Communicator) -> Tensor:
    padded = nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, max(sizes) - x.shape[0]))
    every = comm.all_gather(padded)
    return torch.cat([each[:size] for each, size in zip(every, sizes, strict=True)])


def _own(x: Tensor, sizes: list[int], comm: Communicator, summed: bool) -> Tensor:
    parts = x.split(sizes)
    if not summed:
        return parts[comm.rank].contiguous()
    most = max(sizes)
    padded = torch.stack([nn.functional.pad(part, (0, 0) * (x.dim() - 1) + (0, most - len(part))) for part in parts])
    return comm.reduce_scatter(padded)[: sizes[comm.rank]]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], comm: Communicator, summed: bool) -> Tensor:
        ctx.sizes, ctx.comm, ctx.summed = sizes, comm, summed
        return _gather(x, sizes, comm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _own(grad, ctx.sizes, ctx.comm, ctx.summed), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int], comm: Communicator, summed: bool) -> Tensor:
        ctx.sizes, ctx.comm = sizes, comm
        return _own(y, sizes, comm, summed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, ctx.sizes, ctx.comm), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, comm: Communicator) -> Tensor:
        return comm.all_reduce(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _OwnColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias_eF: Tensor, width: ExpertWidth) -> Tensor:
        ctx.width = width
        return slice_of(bias_eF, width.columns, width.comm.rank, width.comm.size).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_ef: Tensor) -> tuple[Tensor, None]:
        parts = ctx.width.comm.all_gather(grad_ef)
        if isinstance(ctx.width.columns, _StridedShard):
            halves = [part.chunk(2, dim=1) for part in parts]
            return torch.cat([half[which] for which in range(2) for half in halves], dim=1), None
        return torch.cat(list(parts), dim=1), None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, here: bool) -> Tensor:
        return bias.view_as(bias) if here else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
