"""What torch functions make of lazy tensors: results each of whose boxes is made of boxes of the arguments.

A rule takes the function's arguments and returns its lazy result, or NotImplemented to have the function run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeweave.parallel.hf.boxes import whole
from moeweave.parallel.hf.lazy import LazyCast, LazyCat, LazyTensor, LazyView


def _index(base: LazyTensor, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if any(not (one is Ellipsis or one is None or isinstance(one, (int, slice))) for one in index):
        return NotImplemented
    if Ellipsis in index:
        at = index.index(Ellipsis)
        given = sum(one is not None and one is not Ellipsis for one in index)
        index = (*index[:at], *[slice(None)] * (len(base.sizes) - given), *index[at + 1 :])
    box, d = list(whole(base.sizes)), 0
    dims: list[int | None] = []
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
                return NotImplemented
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


RULES: dict[str, Callable] = {
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
    "__getitem__": _index,
}
