"""Tensors that are described and not read: shape, dtype, and how to get any box of them.

`LazyTensor`s go through code that rearranges weights (stack, cat, chunk, transpose, ...) in place of real tensors. What
comes out knows, for any box of it, which boxes of which sources hold those numbers, so a rank reads or writes its own
share and nothing else. An operation without a rule here still works: it is run on whole tensors when a box of its
result is asked for, and logged once.

Worked example: `torch.stack([a, b])[1]` of two lazy (4, 2) tensors, asked for the box ((0, 1), (0, 2)), reads one row of
b and nothing of a.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from moeweave.parallel.hf.boxes import Box, box_shape, box_slices, intersect, shift, whole

logger = logging.getLogger(__name__)


class LazyTensor:
    """Base of the nodes. A node gives `shape`, `dtype`, `fill(out, box)` and `leaves(box)`.

    It stands in for a tensor in torch functions through `__torch_function__`, without being one: nothing can read its
    numbers by accident.
    """

    shape: torch.Size
    dtype: torch.dtype

    def fill(self, out: torch.Tensor, box: Box) -> None:
        """Write the numbers of `box` into `out`, a tensor of the box's shape, casting to its dtype."""
        raise NotImplementedError

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        """The sources and their boxes that `fill(_, box)` reads."""
        raise NotImplementedError

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The numbers of `box` (default: all) as a new CPU tensor."""
        box = whole(self.shape) if box is None else box
        out = torch.empty(box_shape(box), dtype=self.dtype)
        if out.numel():
            self.fill(out, box)
        return out

    # ---- what code written for tensors asks of one

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def T(self) -> LazyTensor:  # noqa: N802
        return self.t()

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> LazyTensor:
        return _index(self, index if isinstance(index, tuple) else (index,))

    def to(self, *args: Any, **kwargs: Any) -> LazyTensor:
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        return LazyCast(self, dtypes[0]) if dtypes and dtypes[0] != self.dtype else self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = _RULES.get(getattr(func, "__name__", ""))
        result = rule(*args, **(kwargs or {})) if rule is not None else NotImplemented
        return _opaque(func, args, kwargs or {}) if result is NotImplemented else result

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("_") or not callable(method):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return lambda *args, **kwargs: LazyTensor.__torch_function__(method, (), (self, *args), kwargs)


class LazySource(LazyTensor):
    """Where numbers come from. `read_box(box)` gives a tensor of the box's shape; `name` identifies the source."""

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, read_box: Callable[[Box], torch.Tensor]):
        self.name, self.shape, self.dtype, self.read_box = name, torch.Size(shape), dtype, read_box

    def fill(self, out: torch.Tensor, box: Box) -> None:
        out.copy_(self.read_box(box))

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        yield self, box


class LazyCat(LazyTensor):
    """Parts one after the other along `dim`."""

    def __init__(self, parts: Sequence[LazyTensor], dim: int):
        self.parts, self.at = list(parts), dim % parts[0].ndim
        self.dtype = parts[0].dtype
        shape = list(parts[0].shape)
        for part in parts:
            rest = [n for d, n in enumerate(part.shape) if d != self.at]
            if rest != [n for d, n in enumerate(shape) if d != self.at]:
                raise ValueError(f"cannot concatenate shapes {[tuple(p.shape) for p in parts]} along dim {self.at}")
        shape[self.at] = sum(part.shape[self.at] for part in parts)
        self.shape = torch.Size(shape)

    def _overlaps(self, box: Box) -> Iterator[tuple[LazyTensor, Box, Box]]:
        start = 0
        for part in self.parts:
            stop = start + part.shape[self.at]
            here = list(whole(self.shape))
            here[self.at] = (start, stop)
            if (common := intersect(box, tuple(here))) is not None:
                yield part, shift(common, tuple(here)), shift(common, box)
            start = stop

    def fill(self, out: torch.Tensor, box: Box) -> None:
        for part, inner, outer in self._overlaps(box):
            part.fill(out[box_slices(outer)], inner)

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        for part, inner, _ in self._overlaps(box):
            yield from part.leaves(inner)


class LazyView(LazyTensor):
    """A box of `base`, its dims reordered, dropped (those of size one) or added: result dim d is base dim `dims[d]`,
    or a new dim of size one where that is None."""

    def __init__(self, base: LazyTensor, box: Box, dims: Sequence[int | None]):
        self.base, self.box, self.dims = base, box, tuple(dims)
        self.dtype = base.dtype
        sizes = box_shape(box)
        self.shape = torch.Size(1 if d is None else sizes[d] for d in dims)

    def _base_box(self, box: Box) -> Box:
        inner = list(self.box)
        for (start, stop), d in zip(box, self.dims, strict=True):
            if d is not None:
                inner[d] = (self.box[d][0] + start, self.box[d][0] + stop)
        return tuple(inner)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        inner = self._base_box(box)
        kept = [position for position, d in enumerate(self.dims) if d is not None]
        dropped = [d for d in range(self.base.ndim) if d not in self.dims]
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

    def __init__(self, base: LazyTensor, dtype: torch.dtype):
        self.base, self.shape, self.dtype = base, base.shape, dtype

    def fill(self, out: torch.Tensor, box: Box) -> None:
        rounded = torch.empty(out.shape, dtype=self.dtype)
        self.base.fill(rounded, box)
        out.copy_(rounded)

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        return self.base.leaves(box)


class LazyCall(LazyTensor):
    """One result of a function that has no rule: the function runs on whole tensors, once."""

    def __init__(self, call: _Call, at: int | None, like: torch.Tensor):
        self.call, self.at, self.shape, self.dtype = call, at, like.shape, like.dtype

    def fill(self, out: torch.Tensor, box: Box) -> None:
        result = self.call.results()
        out.copy_((result if self.at is None else result[self.at])[box_slices(box)])

    def leaves(self, box: Box) -> Iterator[tuple[LazySource, Box]]:
        for lazy in self.call.inputs:
            yield from lazy.leaves(whole(lazy.shape))


class _Call:
    def __init__(self, func: Callable, args: tuple, kwargs: dict):
        self.func, self.args, self.kwargs = func, args, kwargs
        self.inputs: list[LazyTensor] = []
        _map(self.inputs.append, (args, kwargs))
        self._results: Any = None

    def on(self, convert: Callable[[LazyTensor], torch.Tensor]) -> Any:
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
    meta = call.on(lambda lazy: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta"))
    if isinstance(meta, torch.Tensor):
        return LazyCall(call, None, meta)
    if isinstance(meta, (tuple, list)) and all(isinstance(one, torch.Tensor) for one in meta):
        return type(meta)(LazyCall(call, at, one) for at, one in enumerate(meta))
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
        return _opaque(torch.Tensor.__getitem__, (base, index), {})
    if Ellipsis in index:
        at = index.index(Ellipsis)
        given = sum(one is not None and one is not Ellipsis for one in index)
        index = (*index[:at], *[slice(None)] * (base.ndim - given), *index[at + 1 :])
    box, dims, d = list(whole(base.shape)), [], 0
    for one in index:
        if one is None:
            dims.append(None)
            continue
        if isinstance(one, int):
            if not -base.shape[d] <= one < base.shape[d]:
                raise IndexError(f"index {one} is out of range for dim {d} of shape {tuple(base.shape)}")
            box[d] = (one % base.shape[d], one % base.shape[d] + 1)
        else:
            start, stop, step = one.indices(base.shape[d])
            if step != 1:
                return _opaque(torch.Tensor.__getitem__, (base, index), {})
            box[d] = (start, max(start, stop))
            dims.append(d)
        d += 1
    return LazyView(base, tuple(box), [*dims, *range(d, base.ndim)])


def _cat(tensors: Sequence[LazyTensor], dim: int = 0, **_: Any) -> Any:
    parts = [t for t in tensors if isinstance(t, LazyTensor)]
    return LazyCat(parts, dim) if len(parts) == len(tensors) and len({t.dtype for t in parts}) == 1 else NotImplemented


def _stack(tensors: Sequence[LazyTensor], dim: int = 0, **_: Any) -> Any:
    if not all(isinstance(t, LazyTensor) for t in tensors):
        return NotImplemented
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


def _unsqueeze(base: LazyTensor, dim: int) -> LazyTensor:
    dims: list[int | None] = list(range(base.ndim))
    dims.insert(dim % (base.ndim + 1), None)
    return LazyView(base, whole(base.shape), dims)


def _squeeze(base: LazyTensor, dim: int | None = None) -> LazyTensor:
    gone = [d for d in range(base.ndim) if base.shape[d] == 1 and (dim is None or d == dim % base.ndim)]
    return LazyView(base, whole(base.shape), [d for d in range(base.ndim) if d not in gone])


def _transpose(base: LazyTensor, dim0: int, dim1: int) -> LazyTensor:
    dims = list(range(base.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return LazyView(base, whole(base.shape), dims)


def _permute(base: LazyTensor, *dims: Any) -> LazyTensor:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return LazyView(base, whole(base.shape), [d % base.ndim for d in order])


def _narrow(base: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    box = list(whole(base.shape))
    box[dim] = (start, start + length)
    return LazyView(base, tuple(box), range(base.ndim))


def _split(base: LazyTensor, sizes: int | Sequence[int], dim: int = 0) -> Any:
    total = base.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if sum(sizes) != total:
        raise ValueError(f"cannot split dim {dim} of shape {tuple(base.shape)} into {list(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(base, dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _chunk(base: LazyTensor, chunks: int, dim: int = 0) -> Any:
    return _split(base, max(1, -(-base.shape[dim] // chunks)), dim)


def _same(base: LazyTensor, *_: Any, **__: Any) -> LazyTensor:
    return base


_RULES: dict[str, Callable] = {
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "t": lambda base: _transpose(base, 0, -1) if base.ndim == 2 else base,
    "permute": _permute,
    "narrow": _narrow,
    "split": _split,
    "chunk": _chunk,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "cpu": _same,
    "is_floating_point": lambda base: base.dtype.is_floating_point,
    "element_size": lambda base: base.dtype.itemsize,
}
