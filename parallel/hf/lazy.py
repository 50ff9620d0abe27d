"""Tensors that are described and not read: shape, dtype, and how to get any box of them.

`LazyTensor`s go through code that rearranges weights (stack, cat, chunk, transpose, ...) in place of real tensors. What
comes out knows, for any box of it, which boxes of which sources hold those numbers, so a rank reads or writes its own
share and nothing else. An operation without a rule here still works: it is run on whole tensors when a box of its
result is asked for, and logged once.

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

logger = logging.getLogger(__name__)


class LazyTensor(Tensor):
    """Base of the nodes. A node gives `fill(out, box)` and `leaves(box)`; shape and dtype are a tensor's own.

    It is a tensor to code that asks for one, has no memory, and raises where numbers would be needed.
    """

    sizes: tuple[int, ...]

    @staticmethod
    def __new__(cls: Any, sizes: Sequence[int], dtype: torch.dtype) -> Any:
        node = Tensor._make_wrapper_subclass(cls, torch.Size(sizes), dtype=dtype, device="cpu")  # type: ignore[attr-defined]
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
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(name)
        result = rule(*args, **kwargs) if rule is not None else NotImplemented
        return _opaque(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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


def _opaque(func: Callable, args: tuple, kwargs: dict) -> Any:
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


# ---- rules: functions of lazy tensors whose results can be sliced through


def _index(base: LazyTensor, index: tuple) -> LazyTensor:
    if any(not (one is Ellipsis or one is None or isinstance(one, (int, slice))) for one in index):
        return _opaque(Tensor.__getitem__, (base, index), {})
    if Ellipsis in index:
        at = index.index(Ellipsis)
        given = sum(one is not None and one is not Ellipsis for one in index)
        index = (*index[:at], *[slice(None)] * (len(base.sizes) - given), *index[at + 1 :])
    box, dims, d = list(whole(base.sizes)), [], 0
    for one in index:
        if one is None:
            dims.append(None)
            continue
        if isinstance(one, int):
            if not -base.sizes[d] <= one < base.sizes[d]:
                raise IndexError(f"index {one} is out of range for dim {d} of shape {base.sizes}")
            box[d] = (one % base.sizes[d], one % base.sizes[d] + 1)
        else:
            start, stop, step = one.indices(base.sizes[d])
            if step != 1:
                return _opaque(Tensor.__getitem__, (base, index), {})
            box[d] = (start, max(start, stop))
            dims.append(d)
        d += 1
    return LazyView.of(base, tuple(box), [*dims, *range(d, len(base.sizes))])


def _cat(tensors: Sequence[LazyTensor], dim: int = 0, **_: Any) -> Any:
    parts = [t for t in tensors if isinstance(t, LazyTensor)]
    return (
        LazyCat.of(parts, dim) if len(parts) == len(tensors) and len({t.dtype for t in parts}) == 1 else NotImplemented
    )


def _stack(tensors: Sequence[LazyTensor], dim: int = 0, **_: Any) -> Any:
    if not all(isinstance(t, LazyTensor) for t in tensors):
        return NotImplemented
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


def _unsqueeze(base: LazyTensor, dim: int) -> LazyTensor:
    dims: list[int | None] = list(range(len(base.sizes)))
    dims.insert(dim % (len(base.sizes) + 1), None)
    return LazyView.of(base, whole(base.sizes), dims)


def _squeeze(base: LazyTensor, dim: int | None = None) -> LazyTensor:
    gone = [d for d in range(len(base.sizes)) if base.sizes[d] == 1 and (dim is None or d == dim % len(base.sizes))]
    return LazyView.of(base, whole(base.sizes), [d for d in range(len(base.sizes)) if d not in gone])


def _transpose(base: LazyTensor, dim0: int, dim1: int) -> LazyTensor:
    dims = list(range(len(base.sizes)))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return LazyView.of(base, whole(base.sizes), dims)


def _permute(base: LazyTensor, *dims: Any) -> LazyTensor:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return LazyView.of(base, whole(base.sizes), [d % len(base.sizes) for d in order])


def _narrow(base: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    box = list(whole(base.sizes))
    box[dim] = (start, start + length)
    return LazyView.of(base, tuple(box), range(len(base.sizes)))


def _split(base: LazyTensor, sizes: int | Sequence[int], dim: int = 0) -> Any:
    total = base.sizes[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if sum(sizes) != total:
        raise ValueError(f"cannot split dim {dim} of shape {base.sizes} into {list(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(base, dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _chunk(base: LazyTensor, chunks: int, dim: int = 0) -> Any:
    return _split(base, max(1, -(-base.sizes[dim] // chunks)), dim)


def _unbind(base: LazyTensor, dim: int = 0) -> Any:
    return tuple(_squeeze(_narrow(base, dim, at, 1), dim) for at in range(base.sizes[dim]))


def _to(base: LazyTensor, *args: Any, **kwargs: Any) -> LazyTensor:
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    return LazyCast.of(base, dtypes[0]) if dtypes and dtypes[0] != base.dtype else base


def _same(base: LazyTensor, *_: Any, **__: Any) -> LazyTensor:
    return base


# Answered from shape and dtype alone.
_METADATA = {
    "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_meta", "itemsize", "size", "dim", "numel",
    "nelement", "element_size", "is_floating_point", "is_complex", "__len__", "stride", "is_contiguous",
}  # fmt: skip

_RULES: dict[str, Callable] = {
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "t": lambda base: _transpose(base, 0, -1) if len(base.sizes) == 2 else base,
    "T": lambda base: _permute(base, *reversed(range(len(base.sizes)))),
    "mT": lambda base: _transpose(base, -1, -2),
    "permute": _permute,
    "narrow": _narrow,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "data": _same,
    "cpu": _same,
    "to": _to,
    "__getitem__": lambda base, index: _index(base, index if isinstance(index, tuple) else (index,)),
}
