"""What of a model mixes positions of a sequence, and so must be known before ranks share one.

Between ranks that hold different positions only attention may mix: everything else must treat each token alone. Of a
Hugging Face model the modules tell: attention reads transformers' registry, and whatever else takes a mask or a cache
(state-space and linear attention, convolutions, indexers) is refused by name. A plain model has to say it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from moeweave.parallel.adapter import MoEBlock, UnsupportedModel
from moeweave.parallel.hf.attention import is_attention

PROMISE = "splits_sequence"
_MIXER_ARGUMENTS = ("mask", "cache", "past_key")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers_of(model: nn.Module, blocks: list[MoEBlock]) -> nn.ModuleList:
    """The list of layers between which hidden states stay sharded: the one that holds the model's experts.

    Raises:
        UnsupportedModel: there is none, or more than one.
    """
    experts = {id(module) for block in blocks for module in block.experts.modules()}
    found: list[nn.ModuleList] = []
    inside = set(experts)
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        inside.update(id(child) for child in module.modules())
        if not blocks or any(id(child) in experts for child in module.modules()):
            found.append(module)
    if len(found) != 1:
        raise UnsupportedModel(
            f"sp and tp_sequence need one ModuleList of layers to share a sequence in, and {type(model).__name__} has "
            f"{len(found)} (with experts). Set sp=1 and Plan(tp_sequence=False)."
        )
    return found[0]


def attentions_of(model: nn.Module, layers: nn.ModuleList, blocks: list[MoEBlock]) -> dict[str, nn.Module]:
    """Attention modules of a Hugging Face model's layers, by path; of a plain model none, but its promise is checked.

    Raises:
        UnsupportedModel: something else mixes positions, or attention has a part that cannot be told.
    """
    if not hasattr(model, "base_model_prefix"):
        _check_promise(model)
        return {}
    experts = {id(module) for block in blocks for module in block.experts.modules()}
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for layer in layers:
        modules = [module for module in layer.modules() if id(module) not in experts]
        mine = [module for module in modules if is_attention(module)]
        for module in modules:
            _refuse_mixer(paths[id(module)], module)
        if not mine:
            raise UnsupportedModel(
                f"{paths[id(layer)]} ({type(layer).__name__}) has no attention that reads transformers' registry, so "
                "what mixes its positions cannot be told. Set sp=1 and Plan(tp_sequence=False)."
            )
        found |= {paths[id(module)]: module for module in mine}
    for path, module in found.items():
        _check_parts(path, module)
    return found


def _check_promise(model: nn.Module) -> None:
    if not getattr(model, PROMISE, False):
        raise UnsupportedModel(
            f"sp and tp_sequence cannot see what {type(model).__name__} does with positions. If its layers hand each "
            "output to the next, mix positions in F.scaled_dot_product_attention only and take positions and masks as "
            f"arguments, set `{PROMISE} = True` on the model; else set sp=1 and Plan(tp_sequence=False)."
        )


def _refuse_mixer(path: str, module: nn.Module) -> None:
    takes = inspect.signature(type(module).forward).parameters
    mixes = any(part in name for name in takes for part in _MIXER_ARGUMENTS)
    around = any(is_attention(child) for child in module.modules())
    if isinstance(module, _CONVOLUTIONS) or (mixes and not around):
        raise UnsupportedModel(
            f"{path} ({type(module).__name__}) mixes the positions of a sequence and is no attention of transformers' "
            "registry: ranks cannot share a sequence that goes through it. Set sp=1 and Plan(tp_sequence=False)."
        )


def _check_parts(path: str, module: Any) -> None:
    """Attention may hold projections and norms; anything else with parameters could look at other positions."""
    for name, child in module.named_children():
        # A layer around a linear one (an adapter's) is linear too.
        known = type(child) is nn.Linear or hasattr(child, "base_layer") or "norm" in type(child).__name__.lower()
        if any(True for _ in child.parameters()) and not known:
            raise UnsupportedModel(
                f"{path}.{name} ({type(child).__name__}) is a part of attention that sp and tp_sequence do not know. "
                "Set sp=1 and Plan(tp_sequence=False)."
            )


def refuse_own_parameters(path: str, module: nn.Module) -> None:
    """Raise UnsupportedModel for what the attention function itself may read and ring attention does not compute."""
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        raise UnsupportedModel(
            f"{path} ({type(module).__name__}) has {', '.join(own)}, which Plan(sequence='ring') does not compute. Use "
            "Plan(sequence='ulysses'), or set sp=1."
        )


def num_heads(module: Any) -> int | None:
    """Query heads of an attention module, as it or its config says."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None
