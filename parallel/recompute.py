"""Activation checkpointing that replays routing instead of computing it anew.

A recomputed router may pick other experts than the first time (ties, kernels that are not deterministic): rows would
then meet the wrong experts in backward. So the choices (the indices of every top-k) and the layouts made from them are
kept from the forward pass, which also spares the exchange of counts; everything else is recomputed.

torch's own selective checkpointing keeps whole outputs and refuses operators whose output is then changed in place, as
transformers' routers do with the values of their top-k. Here the values are gathered anew with the kept indices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moeweave.parallel.span import current_span, spanning


def _is_agreed(op: Any) -> bool:
    """Operators that agree on something over ranks: layouts, and whether to cut the tokens into chunks."""
    ops = torch.ops.moeweave
    return op in (ops.exchange_layout.default, ops.gather_layout.default, ops.least_of_ranks.default)


class _Record(TorchDispatchMode):
    """Keeps the routing of a forward pass, in order."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            self.kept.append(out[1].clone())
        elif _is_agreed(func):
            self.kept.append(out)
        elif func is torch.ops.moeweave.onesided_dispatch.default:
            self.kept.append(tuple(out[1:]))
        elif func is torch.ops.moeweave.onesided_cuda_dispatch.default:
            self.kept.append((out[0].shape[0], *out[2:]))
        return out


class _Replay(TorchDispatchMode):
    """Answers with what `_Record` kept, in the same order."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept
        self.position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.topk.default:
            indices = self._next()
            dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
            return torch.gather(args[0], dim, indices), indices.clone()
        if _is_agreed(func):
            return self._next()
        if func is torch.ops.moeweave.onesided_dispatch.default:
            x_TD, _, weights_TK, _, settings = args
            _, offsets_e, moves = self._next()
            rows_RD, weights_R = torch.ops.moeweave.onesided_resend(x_TD, weights_TK, moves, settings)
            return rows_RD, weights_R, offsets_e, moves
        if func is torch.ops.moeweave.onesided_cuda_dispatch.default:
            x_TD, ids_TK, weights_TK, _, _, *settings = args
            capacity, *moves = self._next()
            resent = torch.ops.moeweave.onesided_cuda_resend(x_TD, weights_TK, [ids_TK, *moves], capacity, *settings)
            return *resent, *moves
        return func(*args, **(kwargs or {}))

    def _next(self) -> Any:
        self.position += 1
        return self.kept[self.position - 1]


class _Around(TorchFunctionMode):
    """Puts a dispatch mode around the calls that it looks at and around no other: around all of a layer it would cost
    every operator microseconds of Python, and a GPU would wait for them."""

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TOP_K or getattr(func, "namespace", None) == "moeweave":
            with self.mode:
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_TOP_K = (torch.topk, torch.Tensor.topk)


class _AroundAgain(_Around):
    """`_Around` for a recomputation: from the first thing kept on, in the same span of shared sequences."""

    def __init__(self, replay: _Replay) -> None:
        super().__init__(replay)
        self.replay = replay
        self.span = current_span()

    def __enter__(self) -> Any:
        self.replay.position = 0
        self.spanning = spanning(self.span)
        self.spanning.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:  # noqa: PYI036
        super().__exit__(*error)
        self.spanning.__exit__(*error)


def replay_routing() -> tuple[Any, Any]:
    """`context_fn` for torch.utils.checkpoint.checkpoint (use_reentrant=False): keep routing, recompute the rest."""
    kept: list[Any] = []
    return _Around(_Record(kept)), _AroundAgain(_Replay(kept))


def apply_recompute(model: nn.Module, units: list[nn.Module]) -> None:
    """Checkpoint the activations of each unit: by the model's own switch where it has one, else around its forward."""
    enable: Callable[..., None] | None = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None and getattr(model, "supports_gradient_checkpointing", False):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": replay_routing})
        return
    for unit in units:
        unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False, context_fn=replay_routing)
