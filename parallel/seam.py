"""Where another module's call is taken over: arguments of an experts' call, attributes in place of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def seam_arguments(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """(hidden, ids, weights) of a call, whichever of the last two comes first: ids are the integers."""
    names = list(forward.__code__.co_varnames[1 : forward.__code__.co_argcount]) if kwargs else []
    tensors = [*args, *(kwargs[name] for name in names if name in kwargs)] if names else list(args)
    tensors += [value for name, value in kwargs.items() if name not in names]
    hidden, second, third = tensors[:3]
    return (hidden, third, second) if second.is_floating_point() else (hidden, second, third)


def weights_first(forward: Callable[..., Any]) -> bool:
    """True for an experts' forward that takes the weights before the ids, by the names of its arguments."""
    second = "".join(list(inspect.signature(forward).parameters)[2:3])
    return any(part in second for part in ("weight", "score", "prob"))


@contextmanager
def shadowed(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Attributes of the instance that hide the module's parameters of the same names while the block runs."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            del module.__dict__[name]
        module.__dict__.update(before)
