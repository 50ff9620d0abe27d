"""Nested plain values and tensors as JSON beside a flat dictionary of tensors, so that nothing needs a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from moeweave.parallel.agreement import CheckpointError

# What JSON has no form for is a dictionary with one of these as its only key.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def pack(value: Any, tensors: dict[str, Tensor], prefix: str, where: str) -> Any:
    """`value` as JSON; its tensors go into `tensors` under `prefix`. `where` names it in errors.

    Raises CheckpointError for a value that is none of None, bool, int, float, str, list, tuple, dict, tensor.
    """
    if isinstance(value, Tensor):
        if isinstance(value, DTensor):
            raise CheckpointError(f"{where} is a DTensor. Pass its local part: value.to_local().")
        name = f"{prefix}/{len(tensors)}"
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        packed = [pack(one, tensors, prefix, f"{where}[{at}]") for at, one in enumerate(value)]
        return packed if isinstance(value, list) else {_TUPLE: packed}
    if isinstance(value, Mapping):
        items = [(key, pack(one, tensors, prefix, f"{where}[{key!r}]")) for key, one in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {_ITEMS: [[pack(key, tensors, prefix, f"a key of {where}"), one] for key, one in items]}
    raise CheckpointError(
        f"{where} is of type {type(value).__name__}, which cannot be saved. "
        "Use numbers, strings, lists, tuples, dicts and tensors (of a NumPy array: torch.from_numpy)."
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(packed, list):
        return [unpack(one, tensors) for one in packed]
    if not isinstance(packed, dict):
        return packed
    if packed.keys() == {_TENSOR}:
        return tensors[packed[_TENSOR]]
    if packed.keys() == {_TUPLE}:
        return tuple(unpack(one, tensors) for one in packed[_TUPLE])
    if packed.keys() == {_ITEMS}:
        return {unpack(key, tensors): unpack(one, tensors) for key, one in packed[_ITEMS]}
    return {key: unpack(one, tensors) for key, one in packed.items()}


def tensor_names(packed: Any) -> list[str]:
    """Names of the tensors that `unpack` will ask for."""
    if isinstance(packed, list):
        return [name for one in packed for name in tensor_names(one)]
    if not isinstance(packed, dict):
        return []
    if packed.keys() == {_TENSOR}:
        return [packed[_TENSOR]]
    return [name for one in packed.values() for name in tensor_names(one)]
