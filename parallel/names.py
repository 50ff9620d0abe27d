"""The names under which a model's tensors are saved: Hugging Face's own, whatever wraps the model."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moeweave.parallel.agreement import CheckpointError

# What torch.compile and activation checkpointing put into names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def bare_name(name: str) -> str:
    """`name` without the parts that wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def model_class(model: nn.Module) -> type[nn.Module]:
    """The class that the model was built from: FSDP puts one of its own before it."""
    kinds = type(unwrap(model)).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith("torch.distributed"))


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by bare name, sharing the model's memory. Names may differ between ranks: with
    experts in a ModuleList each rank has those of its own experts.

    Raises CheckpointError for module state that is no tensor (`get_extra_state`).
    """
    state = {bare_name(name): value for name, value in unwrap(model).state_dict().items()}
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{model_class(model).__name__} keeps state that is no tensor: {', '.join(other[:5])}. "
            "Keep it in tensors (buffers), or pass it in extra= and restore it yourself."
        )
    return state


def copied_names(model: nn.Module) -> dict[str, str]:
    """Of weights that are copies of another pipeline stage's: name here -> name there."""
    copies: dict[str, str] = vars(unwrap(model)).get("_moeweave_copies", {})
    return copies


def named_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by bare name; tied ones once, under their first name, whichever pipeline stage has it."""
    own = {bare_name(name): param for name, param in unwrap(model).named_parameters()}
    copies = copied_names(model)
    return {copies.get(name, name): param for name, param in own.items()}


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names that share one parameter, at least two each."""
    groups: dict[int, list[str]] = {}
    for name, param in unwrap(model).named_parameters(remove_duplicate=False):
        groups.setdefault(id(param), []).append(bare_name(name))
    return [names for names in groups.values() if len(names) > 1]


def listed(names: Iterable[str], known: Collection[str] = (), most: int = 5) -> str:
    """`names` for an error text, each with the nearest of the `known` ones."""
    names = sorted(names)
    shown = []
    for name in names[:most]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8) if len(known) < 20_000 else []
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
