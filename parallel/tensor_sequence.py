"""Megatron's sequence parallelism: with `tp`, activations between matrix products are shards (arXiv 2205.05198).

Between attention and MLPs each tp rank holds its own positions; norms, routers and experts run on these alone. A split
attention or MLP gathers its input, computes its heads or columns for all positions, and sums the ranks' parts of the
output back into shards: an all-gather and a reduce-scatter in place of an all-reduce.

Inside layers every parameter that is not split gets the gradient of this rank's positions or heads only, so those
gradients are summed over tp. Embeddings, last norm and head see whole sequences, as without sequence parallelism.

Legend: B rows, S positions that the tp ranks share, s of this rank, T = B * s tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel
from torch.nn.functional import linear

from moeweave.parallel.adapter import MoEBlock, UnsupportedModel
from moeweave.parallel.hf.attention import is_attention
from moeweave.parallel.shards import Shards, gather, pad, scatter
from moeweave.parallel.span import Span, current_span
from moeweave.parallel.sums import SumForward, SumGradient, sum_param_gradients


def apply_tensor_sequence(
    model: nn.Module,
    layers: nn.ModuleList,
    blocks: list[MoEBlock],
    plan: tuple[dict[str, ParallelStyle], list[nn.Module]],
    mesh: DeviceMesh,
) -> dict[str, ParallelStyle]:
    """Prepare `layers` for shards; returns the styles, by path, that take the place of those in them.

    Args:
        plan: styles of the whole model, by path, and the attention modules whose heads are shared out.

    Raises:
        UnsupportedModel: attention that tp does not split would see a part of the sequence only.
    """
    styles, attentions = plan
    shared = {id(module) for module in attentions}
    inside = {id(module) for module in layers.modules()}
    mine = {path: style for path, style in styles.items() if id(model.get_submodule(path)) in inside}
    parents = {path.rpartition(".")[0] for path in mine}
    for path, module in model.named_modules():
        attends = is_attention(module) or f"{path}.o_proj" in mine
        if id(module) in inside - shared and attends:
            raise UnsupportedModel(
                f"{path} ({type(module).__name__}) has heads that tp does not share out, so it would see a part of the "
                "sequence. Use Plan(tp_sequence=False)."
            )
    for path in parents:
        _gather_input(model.get_submodule(path))
    split = {id(model.get_submodule(path)) for path in mine}
    experts = {id(module) for block in blocks for module in block.experts.modules()}
    for module in layers.modules():
        if id(module) not in split | experts and any(True for _ in module.parameters(recurse=False)):
            sum_param_gradients(module, mesh.get_group())
    return {path: Rows() if isinstance(style, RowwiseParallel) else Columns() for path, style in mine.items()}


class Columns(ParallelStyle):
    """A linear layer split by columns, whose input is gathered already: [..., D] -> [..., columns of this rank]."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _split(module, device_mesh, {"weight": Shard(0), "bias": Shard(0)})
        module.forward = lambda x: linear(x, _local(module.weight), _local(module.bias))
        return module


class Rows(ParallelStyle):
    """A linear layer split by rows: the sum over ranks, of this rank's positions."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _split(module, device_mesh, {"weight": Shard(1), "bias": Replicate()})
        group = device_mesh.get_group()

        def forward(x: Tensor) -> Tensor:
            out, span = linear(x, _local(module.weight)), current_span()
            out = SumForward.apply(out, group) if span is None else _scatter_tokens(out, span)
            return out if module.bias is None else out + SumGradient.apply(_local(module.bias), group)

        module.forward = forward
        return module


def _split(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Any]) -> None:
    for name, param in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(param.detach(), mesh, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=param.requires_grad))


def _local(param: Any) -> Any:
    return param.to_local() if isinstance(param, DTensor) else param


def _gather_input(module: nn.Module) -> None:
    """Let a split attention or MLP be called with this rank's tokens and compute on all: its first argument is
    gathered."""

    def gather_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        span = current_span()
        if span is None:
            return None
        if args:
            return (_gather_tokens(args[0], span), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: _gather_tokens(kwargs[name], span)}

    module.register_forward_pre_hook(gather_first, with_kwargs=True)


def _gather_tokens(x: Tensor, span: Span) -> Tensor:
    """[B, s, D] -> [B, S, D]; tokens without positions [T, D] -> as many rows of every rank, filled up with zeros."""
    assert span.tp is not None
    if x.dim() == 3:
        return gather(x, span.tp, 1)
    rows = _rows(span)
    return gather(pad(x, 0, rows.step), rows, 0)


def _scatter_tokens(x: Tensor, span: Span) -> Tensor:
    """What `_gather_tokens` gave, on every rank a part of a sum -> this rank's tokens of the sum."""
    assert span.tp is not None
    if x.dim() == 3:
        return scatter(x, span.tp, 1)
    return scatter(x, _rows(span), 0)[: span.rows * span.tp.held]


def _rows(span: Span) -> Shards:
    assert span.tp is not None
    return Shards(span.rows * span.tp.step * span.tp.comm.size, span.tp.comm)
