"""The rows of a forward pass in parts, with the rows of its key-value cache: micro-batches of `generate` under pp.

A pass is not cut where its parts could not be put together again: other caches than transformers' dynamic ones, outputs
besides logits, arguments that are neither rows nor the same for all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.parallel.hf.attention import CACHES, cache_of
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.prefill import has_rows

_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
_WHOLE_OUTPUTS = ("output_attentions", "output_hidden_states", "labels")


def agree_on_parts(given: dict[str, Any], most: int, mesh: Mesh) -> int:
    """Parts of a forward with these arguments: as many on all ranks (they serve each other's experts in every part), at
    most `most`, and no more than any rank has rows. A collective."""
    parts = torch.tensor(min(_rows(given), most), device=mesh.device)
    dist.all_reduce(parts, op=dist.ReduceOp.MIN)
    return int(parts)


def _rows(given: dict[str, Any]) -> int:
    rows: int = given["input_ids"].shape[0]
    cache = cache_of(given)
    dynamic = cache is None or all(type(layer).__name__ in _LAYERS for layer in getattr(cache, "layers", (None,)))
    asked = any(given.get(name) is not None and given.get(name) is not False for name in _WHOLE_OUTPUTS)
    odd = any(isinstance(value, dict) or _has_other_rows(name, value, rows) for name, value in given.items())
    makes_cache = cache is None and given.get("use_cache")
    return 1 if not dynamic or asked or odd or makes_cache or given.get("return_dict") is False else rows


def _has_other_rows(name: str, value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and has_rows(name, value) and value.shape[0] != rows


def split_rows(given: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """`given` cut into `count` parts by rows, each with its rows of the cache."""
    if count == 1:
        return [given]
    pieces: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and has_rows(name, value):
            pieces[name] = value.tensor_split(count)
        elif name in CACHES and value is not None:
            pieces[name] = split_cache(value, count)
        else:
            pieces[name] = [value] * count
    return [{name: piece[index] for name, piece in pieces.items()} for index in range(count)]


def split_cache(cache: Any, count: int) -> list[Any]:
    """Caches that hold the rows of `cache` in parts; what they are given is not seen in it before `join_caches`."""
    parts = []
    for index in range(count):
        part = copy.copy(cache)
        part.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in part.layers:
            if isinstance(layer.keys, Tensor):
                layer.keys, layer.values = (each.tensor_split(count)[index] for each in (layer.keys, layer.values))
        parts.append(part)
    return parts


def join_caches(cache: Any, parts: list[dict[str, Any]]) -> Any:
    """`cache`, filled with what the caches of the parts hold by now; None stays None."""
    if cache is None:
        return None
    caches = [cache_of(part) for part in parts]
    # A cache may add layers as it is filled.
    cache.layers += caches[0].layers[len(cache.layers) :]
    for layer, same in zip(cache.layers, zip(*(each.layers for each in caches), strict=True), strict=True):
        vars(layer).update(vars(same[0]))
        if isinstance(layer.keys, Tensor):
            layer.keys = torch.cat([each.keys for each in same])
            layer.values = torch.cat([each.values for each in same])
    return cache
