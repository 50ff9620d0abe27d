"""Finds the mixture-of-experts blocks of a model by structure, not by a list of names.

An experts module is anything called as `experts(hidden_TD, expert_ids_TK, weights_TK) -> out_TD`. Three kinds exist:

    packed       transformers' contract: 3-D gate_up_proj / down_proj and the flags that say how they are laid out. Runs
                 on the fast path, one grouped GEMM a projection, with the module's own activation, biases and norm.
    stacked      any other module of that call whose parameters all have the experts as dim 0. Runs its own forward on
                 the rows that arrived, with this rank's slices in place of its parameters.
    modulelist   a module of that call which holds its experts in one ModuleList. Each runs on its own rows.

Blocks that route inside their own forward have no such call: `register_moe` says how to cut them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

PACKED_FLAGS = ("_apply_gate", "has_bias", "is_transposed", "num_experts")
_ROUTER_NAMES = ("gate", "router")
_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")


@dataclass(frozen=True)
class MoEAdapter:
    """How a block that routes inside its own forward is cut into router, experts and output.

    Attributes:
        experts: name of the block's ModuleList of experts.
        route: (block, x_TD) -> (ids_TK int64, weights_TK).
        output: (block, x, y_TD) -> what the block's forward returns for input `x` of any leading shape; by default
            `y_TD` in the shape of `x`.
    """

    experts: str
    route: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    output: Callable[[nn.Module, Tensor, Tensor], Any] = field(default=lambda block, x, y_TD: y_TD.view_as(x))


@dataclass(frozen=True)
class MoEBlock:
    """One experts module found in a model.

    Attributes:
        path: name of the experts module, as in `named_modules`.
        experts: the module.
        kind: "packed", "stacked" or "modulelist".
        num_experts: experts it holds before sharding.
        params: names of its parameters with the experts as dim 0 ("packed", "stacked").
        block_path: name of the parent that owns router and experts.
        router_path, shared_paths: names of the router and of shared experts beside it, where there are any.
        correction_bias: (module path, buffer name) of a choice-only router bias, or None.
        adapter: set for a block cut by `register_moe`.
        slots: the expert in each slot, where a plan places them; None for the order of their ids.
    """

    path: str
    experts: nn.Module
    kind: str
    num_experts: int
    params: tuple[str, ...]
    block_path: str
    router_path: str | None = None
    shared_paths: tuple[str, ...] = ()
    correction_bias: tuple[str, str] | None = None
    adapter: MoEAdapter | None = None
    slots: tuple[int, ...] | None = None

    @property
    def num_slots(self) -> int:
        """Experts that the ranks hold together, replicas counted."""
        return self.num_experts if self.slots is None else len(self.slots)

    @property
    def has_replicas(self) -> bool:
        """Whether some expert has several slots."""
        return self.num_slots > self.num_experts


_REGISTERED: dict[type[nn.Module], MoEAdapter] = {}


def register_moe(cls: type[nn.Module], adapter: MoEAdapter) -> None:
    """Say how blocks of class `cls` (and subclasses) are cut, for `parallelize` of models that hold them.

    Raises:
        TypeError: `cls` is no nn.Module class, or `adapter` no MoEAdapter.

    Example:
        >>> mw.register_moe(MyBlock, mw.MoEAdapter("experts", lambda block, x: block.top_k(x)))
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_moe needs an nn.Module class, got {cls!r}. Pass the class of the block.")
    if not isinstance(adapter, MoEAdapter):
        raise TypeError(f"register_moe needs a MoEAdapter for {cls.__name__}, got {type(adapter).__name__}. Pass one.")
    _REGISTERED[cls] = adapter


class UnsupportedModel(ValueError):
    """The model holds experts that cannot be wrapped; the message names them and says why."""


def find_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """Every experts module of `model`, in the order of `named_modules`.

    Raises:
        UnsupportedModel: experts that do not follow the contract and have no adapter.
    """
    blocks: list[MoEBlock] = []
    claimed: set[int] = set()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if id(module) in claimed:
            continue
        block = _as_block(path, module, modules)
        if block is not None:
            blocks.append(block)
            claimed.update(id(child) for child in module.modules())
            claimed.update(id(child) for child in block.experts.modules())
    for path, module in modules.items():
        if not any(id(child) in claimed for child in module.modules()):
            _refuse_unclaimed(path, module)
    return blocks


def _as_block(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> MoEBlock | None:
    adapter = next((_REGISTERED[cls] for cls in type(module).__mro__ if cls in _REGISTERED), None)
    if adapter is not None:
        experts = dict(module.named_modules()).get(adapter.experts)
        if experts is None:
            raise UnsupportedModel(
                f"{path} ({type(module).__name__}) has no {adapter.experts}, which the adapter registered for "
                f"{type(module).__name__} names as the list of experts. "
                f"Set MoEAdapter.experts to the name of a ModuleList of {type(module).__name__}."
            )
        if not isinstance(experts, nn.ModuleList):
            raise UnsupportedModel(
                f"{path}.{adapter.experts} ({type(experts).__name__}) must be a ModuleList: the adapter registered for "
                f"{type(module).__name__} names it as the list of experts. "
                "Set MoEAdapter.experts to the name of one."
            )
        where = f"{path}.{adapter.experts}".lstrip(".")
        return MoEBlock(where, experts, "modulelist", len(experts), (), path, adapter=adapter)
    if not _follows_seam(module):
        return None
    kind, num_experts, params = _kind(path, module)
    return MoEBlock(path, module, kind, num_experts, params, **_surroundings(path, modules))


def _follows_seam(module: nn.Module) -> bool:
    """True for a module called with (hidden, ids, weights) that says how many experts it has or shows it."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or hasattr(module, "base_layer"):
        return False
    if all(hasattr(module, flag) for flag in PACKED_FLAGS):
        return True
    names = [p for p in inspect.signature(type(module).forward).parameters if p != "self"]
    if len(names) < 3 or not any("ind" in name or "ids" in name or "expert" in name for name in names[:3]):
        return False
    if not any("weight" in name or "score" in name or "prob" in name for name in names[:3]):
        return False
    return bool(_stacked_params(module)) or _expert_list(module) is not None


def _kind(path: str, module: nn.Module) -> tuple[str, int, tuple[str, ...]]:
    experts = _expert_list(module)
    params = _stacked_params(module)
    if experts is not None and not params:
        inside = {id(param) for param in experts.parameters()}
        _refuse_others(path, module, [name for name, param in module.named_parameters() if id(param) not in inside])
        return "modulelist", len(experts), ()
    own = dict(module.named_parameters(recurse=False))
    sizes = {name: param.shape[0] for name, param in own.items() if name in params or param.dim() == 3}
    if len(set(sizes.values())) != 1:
        raise UnsupportedModel(
            f"{path} ({type(module).__name__}): its expert parameters disagree on the number of experts: {sizes}. "
            "Register the block around it with moeweave.register_moe."
        )
    num_experts = next(iter(sizes.values()))
    nested = [(name, param) for name, param in module.named_parameters() if name not in own]
    _refuse_others(path, module, [name for name, p in nested if p.dim() == 3 and p.shape[0] == num_experts])
    packed = all(hasattr(module, flag) for flag in PACKED_FLAGS) and "down_proj" in params
    return "packed" if packed else "stacked", num_experts, params


def is_gated(experts: nn.Module) -> bool:
    """Whether gate and up are packed in one; transformers 5.0 has the parameter but not yet the flag."""
    return bool(getattr(experts, "has_gate", hasattr(experts, "gate_up_proj")))


def _refuse_others(path: str, module: nn.Module, names: list[str]) -> None:
    """Parameters that the kind of experts has no place for: the wrapped model would compute something else."""
    if names:
        raise UnsupportedModel(
            f"{path} ({type(module).__name__}) keeps {', '.join(names)} beside its experts' parameters, where sharding "
            "the experts would leave it out. Register the block around it with moeweave.register_moe."
        )


def _stacked_params(module: nn.Module) -> tuple[str, ...]:
    """Parameters of the module itself with the experts as dim 0, as its 3-D ones have."""
    own = dict(module.named_parameters(recurse=False))
    counts = [param.shape[0] for param in own.values() if param.dim() == 3]
    if not counts:
        return ()
    num_experts = getattr(module, "num_experts", counts[0])
    return tuple(name for name, param in own.items() if param.dim() >= 1 and param.shape[0] in (num_experts, counts[0]))


def _expert_list(module: nn.Module) -> nn.ModuleList | None:
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return lists[0] if len(lists) == 1 else None


def _surroundings(path: str, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Router, shared experts and correction bias beside the experts at `path`: of the nearest parent with a router."""
    parent_path = path
    while parent_path:
        parent_path = parent_path.rpartition(".")[0]
        parent = modules[parent_path]
        children = dict(parent.named_children())
        router = next((name for name in _ROUTER_NAMES if name in children), None)
        if router is None and not hasattr(parent, "base_layer") and not path.startswith(f"{parent_path}.experts"):
            break
        if router is not None:
            join = f"{parent_path}.".lstrip(".")
            bias = _correction_bias(parent, parent_path)
            shared = tuple(f"{join}{name}" for name in _SHARED_NAMES if name in children)
            return {
                "block_path": parent_path,
                "router_path": f"{join}{router}",
                "shared_paths": shared,
                "correction_bias": bias,
            }
    return {"block_path": path.rpartition(".")[0]}


def _correction_bias(block: nn.Module, path: str) -> tuple[str, str] | None:
    """A buffer, or in a few models a frozen parameter, of the block or its router."""
    for name, value in (*block.named_buffers(), *block.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if leaf in _BIAS_NAMES and not value.requires_grad:
            return ".".join(part for part in (path, owner) if part), leaf
    return None


def _refuse_unclaimed(path: str, module: nn.Module) -> None:
    """Experts that nobody claimed would silently stay whole on every rank: better to say so."""
    name, leaf = type(module).__name__, path.rpartition(".")[2]
    looks_like_experts = (name.endswith("Experts") and not leaf.startswith("shared")) or (
        leaf == "experts" and isinstance(module, (nn.ModuleList, nn.ModuleDict))
    )
    if looks_like_experts and any(True for _ in module.parameters()) and not hasattr(module, "base_layer"):
        raise UnsupportedModel(
            f"{path or 'the model'} ({name}) looks like experts but is not called as experts(hidden, ids, weights), so "
            "its tokens cannot be sent to other ranks. Register the block around it with moeweave.register_moe."
        )
