"""Tensors that are described and not read: shape, dtype, and how to get any box of them.

`LazyTensor`s go through code that rearranges weights (stack, cat, chunk, transpose, ...) in place of real tensors. What
comes out knows, for any box of it, which boxes of which sources hold those numbers, so a rank reads or writes its own
share and nothing else. An operation without a rule here still works: it is run on whole tensors when a box of its
result is asked for, and logged.

Worked example: `torch.stack([a, b])[1]` of two lazy (4, 2) tensors, asked for the box ((0, 1), (0, 2)), reads one row
of b and nothing of a.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moeweave.parallel.hf.boxes import Box, box_shape, box_slices, intersect, shift, whole

logger = logging.getLogger("moeweave")


# Answered from shape and dtype alone.
METADATA = {
    "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_meta", "itemsize", "size", "dim", "numel",
    "nelement", "element_size", "is_floating_point", "is_complex", "__len__", "stride", "is_contiguous",
}  # fmt: skip


class LazyTensor(Tensor):
    """Base of the nodes. A node gives `fill(out, box)` and `leaves(box)`; shape and dtype are a tensor's own.

    It is a tensor to code that asks for one, has no memory, and raises where numbers would be needed.
    """

    sizes: tuple[int, ...]

    @staticmethod
    def __new__(cls: Any, sizes: Sequence[int], dtype: torch.dtype) -> Any:
        node = Tensor._make_wrapper_subclass(cls, torch.Size(sizes), dtype=dtype, device=torch.device("cpu"))
        node.sizes = tuple(sizes)
        return node

    def fill(self, out: Tensor, box: Box) -> None:
        """Write the numbers of `box` into `out`, a tensor of the box's shape, casting to its dtype."""
        raise NotImplementedError

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        """The sources and their boxes that `fill(_, box)` reads."""
        raise NotImplementedError

    def read(self, box: Box | None = None) -> Tensor:
        """The numbers of `box` (default: all) as a new CPU tensor."""
        box = whole(self.sizes) if box is None else box
        out = torch.empty(box_shape(box), dtype=self.dtype)
        if out.numel():
            self.fill(out, box)
        return out

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.sizes}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__get__":  # a property
            name = func.__self__.__name__  # type: ignore[attr-defined]
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        from moeweave.parallel.hf.lazy_rules import RULES

        rule = RULES.get(name)
        result = rule(*args, **kwargs) if rule is not None else NotImplemented
        return call_whole(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"a lazy tensor has no numbers to compute {func} with")


class LazySource(LazyTensor):
    """Where numbers come from. `read_box(box)` gives a tensor of the box's shape; `key` names the source."""

    key: str
    read_box: Callable[[Box], Tensor]

    @classmethod
    def of(cls, key: str, sizes: Sequence[int], dtype: torch.dtype, read_box: Callable[[Box], Tensor]) -> LazySource:
        node = cls(sizes, dtype)
        node.key, node.read_box = key, read_box
        return node

    def fill(self, out: Tensor, box: Box) -> None:
        out.copy_(self.read_box(box))

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        yield self, box


class LazyCat(LazyTensor):
    """Parts one after the other along `dim`."""

    parts: list[LazyTensor]
    at: int

    @classmethod
    def of(cls, parts: Sequence[LazyTensor], dim: int) -> LazyCat:
        at, sizes = dim % len(parts[0].sizes), list(parts[0].sizes)
        for part in parts:
            if part.sizes[:at] != parts[0].sizes[:at] or part.sizes[at + 1 :] != parts[0].sizes[at + 1 :]:
                raise ValueError(f"shapes {parts[0].sizes} and {part.sizes} do not concatenate along dim {at}")
        sizes[at] = sum(part.sizes[at] for part in parts)
        node = cls(sizes, parts[0].dtype)
        node.parts, node.at = list(parts), at
        return node

    def _overlaps(self, box: Box) -> Iterator[tuple[LazyTensor, Box, Box]]:
        start = 0
        for part in self.parts:
            stop = start + part.sizes[self.at]
            here = list(whole(self.sizes))
            here[self.at] = (start, stop)
            if (common := intersect(box, tuple(here))) is not None:
                yield part, shift(common, tuple(here)), shift(common, box)
            start = stop

    def fill(self, out: Tensor, box: Box) -> None:
        for part, inner, outer in self._overlaps(box):
            part.fill(out[box_slices(outer)], inner)

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        for part, inner, _ in self._overlaps(box):
            yield from part.leaves(inner)


class LazyView(LazyTensor):
    """A box of `base`, its dims reordered, dropped (those of size one) or added: result dim d is base dim `dims[d]`,
    or a new dim of size one where that is None."""

    base: LazyTensor
    box: Box
    dims: tuple[int | None, ...]

    @classmethod
    def of(cls, base: LazyTensor, box: Box, dims: Sequence[int | None]) -> LazyView:
        sizes = box_shape(box)
        node = cls([1 if d is None else sizes[d] for d in dims], base.dtype)
        node.base, node.box, node.dims = base, box, tuple(dims)
        return node

    def _base_box(self, box: Box) -> Box:
        inner = list(self.box)
        for (start, stop), d in zip(box, self.dims, strict=True):
            if d is not None:
                inner[d] = (self.box[d][0] + start, self.box[d][0] + stop)
        return tuple(inner)

    def fill(self, out: Tensor, box: Box) -> None:
        inner = self._base_box(box)
        kept = [position for position, d in enumerate(self.dims) if d is not None]
        dropped = [d for d in range(len(self.base.sizes)) if d not in self.dims]
        for position in reversed([p for p, d in enumerate(self.dims) if d is None]):
            out = out.squeeze(position)
        order = sorted(range(len(kept)), key=lambda i: self.dims[kept[i]])  # type: ignore[arg-type, return-value]
        out = out.permute(order)
        for d in dropped:
            out = out.unsqueeze(d)
        self.base.fill(out, inner)

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        return self.base.leaves(self._base_box(box))


class LazyCast(LazyTensor):
    """`base` rounded to another dtype."""

    base: LazyTensor

    @classmethod
    def of(cls, base: LazyTensor, dtype: torch.dtype) -> LazyCast:
        node = cls(base.sizes, dtype)
        node.base = base
        return node

    def fill(self, out: Tensor, box: Box) -> None:
        rounded = torch.empty(out.shape, dtype=self.dtype)
        self.base.fill(rounded, box)
        out.copy_(rounded)

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        return self.base.leaves(box)


class LazyCall(LazyTensor):
    """One result of a function that has no rule: the function runs on whole tensors, once."""

    call: _Call
    at: int | None

    @classmethod
    def of(cls, call: _Call, at: int | None, like: Tensor) -> LazyCall:
        node = cls(like.shape, like.dtype)
        node.call, node.at = call, at
        return node

    def fill(self, out: Tensor, box: Box) -> None:
        result = self.call.results()
        out.copy_((result if self.at is None else result[self.at])[box_slices(box)])

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        for lazy in self.call.inputs:
            yield from lazy.leaves(whole(lazy.sizes))


class _Call:
    def __init__(self, func: Callable, args: tuple, kwargs: dict):
        self.func, self.args, self.kwargs = func, args, kwargs
        self.inputs: list[LazyTensor] = []
        _map(self.inputs.append, (args, kwargs))
        self._results: Any = None

    def on(self, convert: Callable[[LazyTensor], Tensor]) -> Any:
        args, kwargs = _map(convert, (self.args, self.kwargs))
        return self.func(*args, **kwargs)

    def results(self) -> Any:
        if self._results is None:
            name = getattr(self.func, "__name__", self.func)
            logger.info("weight conversion %s has no slicing rule: its inputs are read whole", name)
            self._results = self.on(lambda lazy: lazy.read())
        return self._results


def call_whole(func: Callable, args: tuple, kwargs: dict) -> Any:
    """The lazy result of a function that has no rule."""
    call = _Call(func, args, kwargs)
    meta = call.on(lambda lazy: torch.empty(lazy.sizes, dtype=lazy.dtype, device="meta"))
    if isinstance(meta, Tensor):
        return LazyCall.of(call, None, meta)
    if isinstance(meta, (tuple, list)) and all(isinstance(one, Tensor) for one in meta):
        return type(meta)(LazyCall.of(call, at, one) for at, one in enumerate(meta))
    return meta


def _map(convert: Callable[[LazyTensor], Any], value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return convert(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(convert, one) for one in value)
    if isinstance(value, dict):
        return {key: _map(convert, one) for key, one in value.items()}
    return value
