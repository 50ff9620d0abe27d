"""An optimizer's state by parameter name, so that it survives another mesh, other groups and another order.

Tensors shaped like their parameter are spread like it. Options (learning rate, betas, ...) belong to each parameter
rather than to a group: groups differ between meshes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.hf.boxes import Slots, whole_shape
from moeweave.parallel.names import listed, named_params, unwrap
from moeweave.parallel.packing import pack, unpack
from moeweave.parallel.placed import slots_of_params

PREFIX = "optimizer"


@dataclass(frozen=True)
class OptimizerState:
    """Attributes:
    kind: the optimizer's class name.
    tensors: "optimizer/<parameter>/<key>" -> tensor.
    values: parameter -> key -> what of its state is no tensor.
    options: parameter -> its group's options as JSON text.
    """

    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """All but the tensors, as JSON; parameters of equal options together."""
        groups: dict[str, list[str]] = {}
        for name, options in self.options.items():
            groups.setdefault(options, []).append(name)
        listing = [{"options": json.loads(options), "params": names} for options, names in groups.items()]
        return {"kind": self.kind, "groups": listing, "values": self.values}


def merged(descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """What several ranks described, as one: they may hold other parameters."""
    if "engine" in descriptions[0]:
        return descriptions[0]
    options: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {}
    for one in descriptions:
        options |= {name: json.dumps(group["options"]) for group in one["groups"] for name in group["params"]}
        values |= one["values"]
    return OptimizerState(descriptions[0]["kind"], {}, values, options).described()


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Reads the state of this rank's parameters, sharing memory.

    Raises CheckpointError for a parameter that is not the model's and for state that cannot be saved.
    """
    names = _names(model, optimizer)
    state = OptimizerState(type(optimizer).__name__)
    for group in optimizer.param_groups:
        options = json.dumps({key: _option(key, value) for key, value in group.items() if _is_option(key, value)})
        for param in group["params"]:
            name = names[param]
            state.options[name] = options
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    state.tensors[f"{PREFIX}/{name}/{key}"] = value.detach()
                else:
                    packed = pack(value, {}, "", f"optimizer state {key!r} of {name}")
                    state.values.setdefault(name, {})[key] = packed
    return state


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None) -> set[str]:
    """The saved parameters that this rank's optimizer has not.

    Raises CheckpointError when the saved state is not for this optimizer.
    """
    if saved is None:
        raise CheckpointError("the checkpoint was saved without an optimizer. Load it with optimizer=None.")
    if saved["kind"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint holds the state of {saved['kind']}, and the optimizer is {type(optimizer).__name__}. "
            f"Use {saved['kind']}, or load with optimizer=None."
        )
    known = {name for group in saved["groups"] for name in group["params"]}
    own = set(_names(model, optimizer).values())
    if missing := own - known:
        raise CheckpointError(
            f"the optimizer has {len(missing)} parameters that the checkpoint's had not: {listed(missing, known)}. "
            "Give it the same parameters, or load with optimizer=None."
        )
    return known - own


def templates(
    model: nn.Module, optimizer: torch.optim.Optimizer, entries: Mapping[str, TensorStorageMetadata]
) -> dict[str, Tensor]:
    """Empty tensors for the saved state of this rank's parameters, by their names in the checkpoint.

    Raises CheckpointError for state of another shape than its parameter that was saved in shards.
    """
    found: dict[str, Tensor] = {}
    params = {name: param for param, name in _names(model, optimizer).items()}
    placed = slots_of_params(unwrap(model))
    for entry, stored in entries.items():
        prefix, _, rest = entry.partition("/")
        name, _, key = rest.rpartition("/")
        if prefix == PREFIX and name in params:
            live = optimizer.state.get(params[name], {}).get(key)
            found[entry] = _template(params[name], live, stored, entry, placed.get(name))
    return found


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Puts what was read into the optimizer."""
    names = _names(model, optimizer)
    options = {name: group["options"] for group in saved["groups"] for name in group["params"]}
    number = {param: at for at, param in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    by_param: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in tensors.items():
        name, _, key = entry.partition("/")[2].rpartition("/")
        by_param.setdefault(name, {})[key] = tensor
    for param, name in names.items():
        values = {key: unpack(value, {}) for key, value in saved["values"].get(name, {}).items()}
        if own := by_param.get(name, {}) | values:
            state[number[param]] = own
    groups = [_restored_group(group, names, options, number) for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    """The optimizer's parameters in order, with their names in the model."""
    known = {param: name for name, param in named_params(model).items()}
    own = [param for group in optimizer.param_groups for param in group["params"]]
    strange = [tuple(param.shape) for param in own if param not in known]
    if strange:
        raise CheckpointError(
            f"the optimizer holds {len(strange)} parameters that are not the model's (shapes {strange[:3]}). "
            "Create the optimizer after parallelize, from mw.param_groups(model)."
        )
    return {param: known[param] for param in own}


def _is_option(key: str, value: Any) -> bool:
    return key not in ("params", "param_names") and not callable(value)


def _option(key: str, value: Any) -> Any:
    if isinstance(value, Tensor):  # a learning rate that lives on the device
        return {"$scalar": value.item()}
    return pack(value, {}, "", f"optimizer option {key!r}")


def _restored_group(
    group: dict[str, Any],
    names: Mapping[nn.Parameter, str],
    options: Mapping[str, Any],
    number: Mapping[nn.Parameter, int],
) -> dict[str, Any]:
    own = [names[param] for param in group["params"]]
    other = next((name for name in own if options[name] != options[own[0]]), None)
    if other is not None:
        raise CheckpointError(
            f"{own[0]} and {other} are in one group of the optimizer, and were saved with other options "
            f"({options[own[0]]} and {options[other]}). Put them into groups as they were."
        )
    restored = {**group, "params": [number[param] for param in group["params"]]}
    for key, value in (options[own[0]] if own else {}).items():
        if isinstance(value, dict) and value.keys() == {"$scalar"}:
            live = group.get(key)
            restored[key] = live.fill_(value["$scalar"]) if isinstance(live, Tensor) else value["$scalar"]
        else:
            restored[key] = unpack(value, {})
    return restored


def _template(param: nn.Parameter, live: Any, stored: TensorStorageMetadata, entry: str, slots: Slots | None) -> Tensor:
    if isinstance(live, Tensor) and _saved_shape(live, param, slots) == stored.size:
        return torch.empty_like(live.detach())
    dtype = stored.properties.dtype
    if _saved_shape(param, param, slots) == stored.size and param.ndim > 0:
        return torch.zeros_like(param.detach(), dtype=dtype)
    if len(stored.chunks) == 1:  # a count of steps and the like: whole on every rank
        return torch.empty(stored.size, dtype=dtype, device="cpu" if not stored.size else param.device)
    kind = "shards of" if isinstance(param, DTensor) else "a parameter of"
    raise CheckpointError(
        f"{entry} of shape {tuple(stored.size)} was saved in {len(stored.chunks)} pieces, and cannot be placed for "
        f"{kind} shape {tuple(param.shape)}. Take one optimizer step before loading, so that the state exists."
    )


def _saved_shape(tensor: Tensor, param: nn.Parameter, slots: Slots | None) -> torch.Size:
    """Shape in a checkpoint, which holds an expert once, of a parameter or of state that has a row for each of its."""
    return whole_shape(tensor, slots if tensor.shape[:1] == param.shape[:1] else None)
