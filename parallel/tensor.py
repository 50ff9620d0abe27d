"""Tensor parallelism: attention, dense MLPs, shared experts, embeddings and the head, split over the mesh axis `tp`.

torch's DTensor styles do the work: q, k, v, gate and up by columns, o and down by rows, the vocabulary of embeddings
and head by rows, logits gathered where somebody reads them. What is split is found by structure, and for attention with
layers beside q, k and v by the model's own `base_model_tp_plan`. Everything else (norms, routers, latent projections,
forms this file does not know) is kept whole and computed on every tp rank alike, so its gradients are complete and
equal there. Attention that heads cannot be cut out of (sinks, norms over all heads) is computed whole too, between
projections that are split. Experts stay with `ep`: each tp rank routes its share of the tokens (`TokenShares`).

Worked example, `Mesh(tp=2)`, 4 query heads over 2 key heads: rank 0 holds query heads 0 and 1 with key head 0.

Legend: T tokens, t tokens of this tp rank, D width.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from moeweave.parallel.adapter import MoEBlock, UnsupportedModel
from moeweave.parallel.sums import SumForward, SumGradient, sum_param_gradients
from moeweave.parallel.tensor_sequence import apply_tensor_sequence
from moeweave.parallel.vocabulary import install_vocabulary_loss

logger = logging.getLogger("moeweave")
# A dense MLP's layers: split by columns, split by rows. One that has them is taken for an MLP.
_MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate", "up", "down"), ("w1", "w3", "w2"))
_COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")
# Parts of attention that stay whole: latent projections, and norms over one head.
_LATENT = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")


def apply_tensor_parallel(
    model: nn.Module, blocks: list[MoEBlock], mesh: DeviceMesh, sequence: nn.ModuleList | None = None
) -> None:
    """Split `model` over `mesh` (the tp axis, one-dimensional), in place. Names stay; split parameters are DTensors.

    Args:
        sequence: the layers in which activations between matrix products are shards, under tp_sequence.

    Raises:
        UnsupportedModel: nothing in the model can be split.
        ValueError: heads or an MLP's width that tp does not divide; legal sizes are listed.
    """
    styles, attentions = plan_of(model, blocks, mesh.size())
    embedding, head = vocabulary(model, mesh.size())
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    inside = {} if sequence is None else apply_tensor_sequence(model, sequence, blocks, (styles, attentions), mesh)
    styles |= inside
    parallelize_module(model, mesh, styles, src_data_rank=None)
    for path in styles:
        _release_whole(model.get_submodule(path))
    for attention in attentions:
        _localize_heads(attention, mesh, sums=sequence is None)
    if embedding is not None:
        _split_embedding(embedding, mesh)
    if head is not None:
        parallelize_module(head, mesh, ColwiseParallel(), src_data_rank=None)
        _release_whole(head)
        install_vocabulary_loss(model, head, mesh)
        if tied:
            head.weight = embedding.weight


def plan_of(model: nn.Module, blocks: list[MoEBlock], tp: int) -> tuple[dict[str, ParallelStyle], list[nn.Module]]:
    """Styles by path of the layers to split, and the attention modules whose heads are shared out. Changes nothing."""
    experts = {id(module) for block in blocks for module in block.experts.modules()}
    styles: dict[str, ParallelStyle] = {}
    attentions: list[nn.Module] = []
    own = _own_plan(model)
    for path, module in model.named_modules():
        if id(module) in experts:
            continue
        prefix = f"{path}." if path else ""
        columns, rows = _split_of(module)
        if rows == "o_proj" and (reason := _why_whole(module, own.get(_layer_path(path), {}))):
            logger.info("%s (%s) is computed whole on every tp rank: it %s", path, type(module).__name__, reason)
            styles |= {f"{prefix}{name}": style for name, style in _gathered(module, columns, tp).items()}
            continue
        if rows == "o_proj":
            columns += _head_gates(module, own.get(_layer_path(path), {}))
            _check_heads(path, module, tp)
            attentions.append(module)
        elif rows:
            _check_size(f"the width of {path}", module.get_submodule(rows).in_features, tp)
        styles |= {f"{prefix}{name}": ColwiseParallel() for name in columns}
        styles |= {f"{prefix}{rows}": RowwiseParallel()} if rows else {}
    if not styles:
        raise UnsupportedModel(
            f"tp ({tp}) splits attention (q_proj, k_proj, v_proj, o_proj) and MLPs (gate_proj, up_proj, down_proj), "
            f"and {type(model).__name__} has neither. Set tp=1 and use the ranks for dp or ep."
        )
    return styles, attentions


def _split_of(module: nn.Module) -> tuple[list[str], str]:
    """Names of a module's layers that are split by columns, and of the one split by rows; nothing if it is neither
    attention nor an MLP."""
    linear = {name for name, child in module.named_children() if type(child) is nn.Linear}
    if "o_proj" in linear and linear & {"q_proj", "q_b_proj"}:
        return [name for name in _COLUMNS if name in linear], "o_proj"
    held = {name.partition(".")[0] for name, _ in module.named_parameters()}
    for gate, up, down in _MLPS:
        # Whatever else holds parameters (a norm between the layers) might need the whole width.
        if {up, down} <= held <= {gate, up, down} and held <= linear:
            columns = sorted(held - {down})
            width = module.get_submodule(down).in_features
            # A projection of another width holds two halves: cut by columns, a rank would get one of them whole.
            if all(module.get_submodule(name).out_features == width for name in columns):
                return columns, down
    return [], ""


def _own_plan(model: nn.Module) -> dict[str, dict[str, str]]:
    """The model's `base_model_tp_plan`, by module: {"layers.*.self_attn": {"q_proj": "colwise", ...}}."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return {}
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    found: dict[str, dict[str, str]] = {}
    for path, style in plan.items():
        parent, _, name = path.rpartition(".")
        found.setdefault(parent, {})[name] = style
    return found


def _layer_path(path: str) -> str:
    """model.layers.3.self_attn -> layers.*.self_attn"""
    return re.sub(r"\.\d+(?=\.)", ".*", path[path.find("layers.") :] if "layers." in path else path)


def _head_gates(module: nn.Module, own: dict[str, str]) -> list[str]:
    """Layers beside q, k and v that the model's own plan splits by columns: gates of the heads' outputs."""
    return [
        name
        for name, child in module.named_children()
        if own.get(name) == "colwise" and type(child) is nn.Linear and name not in _COLUMNS
    ]


def _why_whole(module: Any, own: dict[str, str]) -> str | None:
    """Why an attention module's heads cannot be shared out, or None if they can."""
    held = {name.partition(".")[0] for name, _ in module.named_parameters()}
    if unknown := sorted(held - {*_COLUMNS, *_LATENT, *_HEAD_NORMS, *_head_gates(module, own), "o_proj"}):
        return f"has {', '.join(unknown)}"
    latent = "kv_b_proj" in held
    if not latent and not {"q_proj", "k_proj", "v_proj"} <= held:
        return "shares or fuses queries, keys or values"
    width = getattr(module, "qk_head_dim" if latent else "head_dim", None)
    if not isinstance(width, int) or not isinstance(getattr(module, "v_head_dim", width), int):
        return "does not say its head_dim"
    for name in _HEAD_NORMS:
        if name in held and any(param.shape[-1] != width for param in getattr(module, name).parameters()):
            return f"normalizes over all heads ({name})"
    if any("gather" in style for style in own.values()):
        return "is gathered by its own plan"
    return None


def _gathered(module: Any, columns: list[str], tp: int) -> dict[str, ParallelStyle]:
    """Styles of attention that is computed whole: projections split where tp divides them, their outputs gathered."""
    styles: dict[str, ParallelStyle] = {
        name: ColwiseParallel(output_layouts=Replicate())
        for name in columns
        if getattr(module, name).out_features % tp == 0
    }
    if module.o_proj.in_features % tp == 0:
        styles["o_proj"] = RowwiseParallel(input_layouts=Replicate())
    return styles


def _check_heads(path: str, module: Any, tp: int) -> None:
    """Raise unless the heads of an attention module divide over tp."""
    latent = hasattr(module, "kv_b_proj")
    width = module.qk_head_dim if latent else module.head_dim
    heads = module.o_proj.in_features // getattr(module, "v_head_dim", width)
    if not latent:
        heads = math.gcd(heads, module.q_proj.out_features // width, module.k_proj.out_features // width)
    _check_size(f"the heads of {path}, queries and keys alike", heads, tp)


def _check_size(what: str, size: int, tp: int) -> None:
    if size % tp:
        legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(f"tp ({tp}) must divide {what} ({size}). tp can be {legal}.")


def _release_whole(module: nn.Module) -> None:
    """Copy a split layer's slices: as views they would keep the whole parameters alive."""
    for name, param in list(module.named_parameters(recurse=False)):
        assert isinstance(param, DTensor)
        local = param.to_local().detach().clone(memory_format=torch.contiguous_format)
        whole = DTensor.from_local(
            local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
        module.register_parameter(name, nn.Parameter(whole, requires_grad=param.requires_grad))


def _localize_heads(attention: Any, mesh: DeviceMesh, sums: bool = True) -> None:
    """Give attention its local head counts, and sum the gradients of whole parts that each rank uses for its heads."""
    for name in _HEAD_COUNTS:
        if isinstance(vars(attention).get(name), int):
            setattr(attention, name, vars(attention)[name] // mesh.size())
    if not sums:
        return
    group = mesh.get_group()
    for name in _HEAD_NORMS:
        if isinstance(norm := getattr(attention, name, None), nn.Module):
            sum_param_gradients(norm, group)
    latent = getattr(attention, "kv_a_proj_with_mqa", None)
    if latent is not None:
        rank = attention.kv_lora_rank
        # The compressed keys pass through kv_b_proj, whose style completes their gradient; the rotary key does not.
        latent.register_forward_hook(
            lambda _, args, out: torch.cat([out[..., :rank], SumGradient.apply(out[..., rank:], group)], dim=-1)
        )


def vocabulary(model: Any, tp: int) -> tuple[Any, Any]:
    """Input embedding and output head of a Hugging Face model, None where it stays whole: a class of its own, a
    vocabulary that tp does not divide, tied to one that stays whole, or on another pipeline stage."""
    if not hasattr(model, "get_input_embeddings"):
        return None, None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    tied = weights[0] is not None and weights[0] is weights[1]
    splits = type(embedding) is nn.Embedding and embedding.num_embeddings % tp == 0 and embedding.max_norm is None
    head_splits = type(head) is nn.Linear and head.out_features % tp == 0
    if tied and not (splits and head_splits):
        return None, None
    return (embedding if splits else None), (head if head_splits else None)


def _split_embedding(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Split a table by rows. torch's own style would take the padding row of each slice for the padding row."""
    weight = embedding.weight
    whole = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    embedding.register_parameter("weight", nn.Parameter(whole, requires_grad=weight.requires_grad))
    _release_whole(embedding)
    rows = embedding.num_embeddings // mesh.size()
    first, group = rows * mesh.get_local_rank(), mesh.get_group()
    padding = embedding.padding_idx
    padding = padding - first if padding is not None and first <= padding < first + rows else None

    def forward(ids: Tensor) -> Tensor:
        table: Any = embedding.weight
        local = ids - first
        here = (local >= 0) & (local < rows)
        out = nn.functional.embedding(local.clamp(0, rows - 1), table.to_local(), padding)
        return SumForward.apply(out * here.unsqueeze(-1).to(out.dtype), group)

    embedding.forward = forward  # type: ignore[method-assign, assignment]
