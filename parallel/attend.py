"""Attention over a sequence that ranks share: what stands in for a model's attention function.

`Plan.sequence` names the way, `ulysses` or `ring`. Hugging Face models reach it through transformers' registry
(`hf/attention.py`), plain ones through `F.scaled_dot_product_attention`, which is answered inside their layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from moeweave.parallel.adapter import UnsupportedModel
from moeweave.parallel.ring import BlockMask, CausalMask, DenseMask, FullMask, ring_attention
from moeweave.parallel.seam import shadowed
from moeweave.parallel.span import Span, current_span
from moeweave.parallel.ulysses import check_heads, heads_of, repeat_keys, to_heads, to_positions

# What transformers hands its attention functions besides: tensors over whole sequences, and one value a query head.
_WHOLE = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_PER_HEAD = ("s_aux",)


def attend_ulysses(
    module: nn.Module, inner: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> Any:
    """transformers' attention call, by the module's own function on this rank's heads of all positions."""
    span = current_span()
    if span is None or span.sp.comm.size == 1:
        return inner(module, query, key, value, mask, **options)
    comm, num_heads = span.sp.comm, query.shape[1]
    check_heads(num_heads, type(module).__name__, comm.size)
    keys, values = repeat_keys(key, comm.size), repeat_keys(value, comm.size)
    query, keys, values = to_heads([query, keys, values], span.sp)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == num_heads > 1:
        mask = heads_of(mask, 1, comm)
    for name, option in options.items():
        if name in _PER_HEAD and isinstance(option, Tensor):
            options[name] = heads_of(option, 0, comm)
        elif name in span.whole:
            options[name] = span.whole[name]
        else:
            _refuse_tensor(module, name, option)
    own: dict[str, Any] = {
        name: heads_of(param, 0, comm)
        for name, param in module.named_parameters(recurse=False)
        if param.shape[0] == num_heads
    }
    if hasattr(module, "num_key_value_groups"):
        own["num_key_value_groups"] = query.shape[1] // keys.shape[1]
    # Functions read these of the module: one value a head (sinks), and query heads a key head.
    with shadowed(module, own):
        out, _ = inner(module, query, keys, values, mask, **options)
    return to_positions(out, span.sp), None


def attend_ring(
    module: nn.Module,
    inner: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Any:
    """transformers' attention call, by ring attention."""
    span = current_span()
    if span is None or span.sp.comm.size == 1:
        return inner(module, query, key, value, mask, scaling=scaling, dropout=dropout, **options)
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            _refuse(module, name)
    for name, option in options.items():
        if name not in span.whole:
            _refuse_tensor(module, name, option)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    out = _ring(query, key, value, mask, causal, scaling, dropout, span)
    return out.transpose(1, 2).contiguous(), None


def _ring(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float | None, dropout: float, span: Span
) -> Tensor:
    if dropout:
        raise ValueError(
            f"Plan.sequence ('ring') computes attention without dropout ({dropout}). Set the model's attention dropout "
            "to 0, or use Plan(sequence='ulysses')."
        )
    blocks: BlockMask = DenseMask(mask) if isinstance(mask, Tensor) else mask
    if mask is None:
        blocks = CausalMask() if causal else FullMask()
    return ring_attention(q, k, v, blocks, scale, span.sp)


def _refuse(module: nn.Module, name: str) -> None:
    raise UnsupportedModel(
        f"{type(module).__name__} hands {name} to its attention, which Plan(sequence='ring') does not compute. Use "
        "Plan(sequence='ulysses'), or set sp=1."
    )


def _refuse_tensor(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.dim() and name not in _WHOLE:
        raise UnsupportedModel(
            f"{type(module).__name__} hands its attention {name} {tuple(value.shape)}, of which sp cannot tell what "
            "belongs to a shard. Set sp=1."
        )


class _SharedAttention(TorchFunctionMode):
    """Answers F.scaled_dot_product_attention inside layers of plain models."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        span = current_span()
        if func is scaled_dot_product_attention and span is not None:
            return _plain(self.way, span, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _plain(
    way: str,
    span: Span,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.shape[2] != span.sp.held:
        raise UnsupportedModel(
            f"F.scaled_dot_product_attention has {query.shape[2]} of the {span.sp.held} positions that tp ranks share: "
            "its projections are not split by tp. Use Plan(tp_sequence=False)."
        )
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if span.sp.comm.size == 1:
        return scaled_dot_product_attention(query, key, value, attn_mask, **options)
    if way == "ring":
        return _ring(query, key, value, attn_mask, is_causal, scale, dropout_p, span)
    comm, num_heads = span.sp.comm, query.shape[1]
    check_heads(num_heads, "scaled_dot_product_attention", comm.size)
    query, key, value = to_heads([query, repeat_keys(key, comm.size), repeat_keys(value, comm.size)], span.sp)
    if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] == num_heads > 1:
        attn_mask = heads_of(attn_mask, 1, comm)
    out = scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return to_positions(out.transpose(1, 2), span.sp).transpose(1, 2)


def answer_plain_attention(layer: nn.Module, way: str) -> None:
    """Compute F.scaled_dot_product_attention inside `layer`, recomputation included, over the shared sequence."""
    own = layer.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _SharedAttention(way):
            return own(*args, **kwargs)

    layer.forward = forward
