"""Writes a wrapped model as a Hugging Face folder, several ranks at a time, never gathering the model on one.

    1. every rank learns all names, shapes and dtypes, and from them, by transformers' conversion mapping reversed, the
       keys on disk and the slices that each is made of
    2. each key gets a rank that writes it: one that holds its slices once shards over other axes than `ep` are gathered
       (a key of one expert: a rank that owns the expert), the one with the fewest bytes so far
    3. parameter by parameter, in the same order on all ranks: gather, cut out own keys, write a file when it is full

A parameter is gathered over `ep` too only if a key on disk needs experts of several ranks (packed families).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from moeweave.parallel.agreement import CheckpointError, agree, everyones, rank
from moeweave.parallel.hf.boxes import (
    Box,
    Slots,
    box_slices,
    by_expert,
    contains,
    gather_axes,
    in_pieces,
    local_pieces,
    placed_boxes,
    shift,
    whole,
    whole_shape,
    whole_tensor,
)
from moeweave.parallel.hf.files import INDEX, WEIGHTS
from moeweave.parallel.hf.lazy import LazySource, LazyTensor

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Export:
    """What is to be written: all of it described, nothing gathered yet.

    Attributes:
        state: this rank's parameters and buffers by name.
        specs: shape and dtype of every name that any rank has, in one order on all ranks.
        stock: where the keys on disk read the gathered parameters from.
        disk: the keys on disk.
        needs: the names that each key is made of.
        slots_of: by name, the slots of experts that a plan has placed.
    """

    state: Mapping[str, Tensor]
    specs: Specs
    stock: Stock
    disk: Mapping[str, LazyTensor]
    needs: Mapping[str, frozenset[str]]
    slots_of: Mapping[str, Slots]


@dataclass(frozen=True)
class Layout:
    """Which rank writes which key into which file.

    Attributes:
        files: per rank, its files: (name, keys).
        gather_all: names of parameters that must be gathered over every axis.
    """

    files: list[list[tuple[str, list[str]]]]
    gather_all: frozenset[str]

    @property
    def weight_map(self) -> dict[str, str]:
        return {key: name for files in self.files for name, keys in files for key in keys}


class Stock(dict[str, list[tuple[Box, Tensor]]]):
    """Gathered parameters by name, from which lazy tensors read."""

    def source(self, name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> LazySource:
        def read_box(box: Box) -> Tensor:
            for held, tensor in self[name]:
                if contains(held, box):
                    return tensor[box_slices(shift(box, held))]
            raise AssertionError(f"{name}: {box} is not among what was gathered")

        return LazySource.of(name, sizes, dtype, read_box)


def describe(
    state: Mapping[str, Tensor],
    to_disk: Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]],
    slots_of: Mapping[str, Slots],
) -> Export:
    """`to_disk` turns lazy parameters into the keys on disk. A collective."""
    specs = _everyones_specs(state, slots_of)
    stock = Stock()
    disk = to_disk({name: stock.source(name, sizes, dtype) for name, (sizes, dtype) in specs.items()})
    return Export(state, specs, stock, disk, _needs(disk), slots_of)


def _needs(disk: Mapping[str, LazyTensor]) -> dict[str, frozenset[str]]:
    return {key: frozenset(_leaf_names(value)) for key, value in disk.items()}


def plan_layout(export: Export, max_bytes: int) -> Layout:
    """Shares the keys out over the ranks and cuts each rank's share into files. A collective."""
    disk, needs = export.disk, export.needs
    order = {name: at for at, name in enumerate(export.specs)}
    keys = sorted(disk, key=lambda key: (max(order[name] for name in needs[key]), key))
    held = {name: held_boxes(tensor, export.slots_of.get(name)) for name, tensor in export.state.items()}
    holders = everyones(bytes(_can_write(disk[key], held) for key in keys))
    havers = everyones(bytes(needs[key] <= export.state.keys() for key in keys))
    load = [0] * len(holders)
    own: list[list[str]] = [[] for _ in holders]
    gather_all: set[str] = set()
    for at, key in enumerate(keys):
        able = [r for r, mask in enumerate(holders) if mask[at]]
        if not able:
            gather_all |= needs[key]
            # Under pp a parameter is on the ranks of one stage.
            able = [r for r, mask in enumerate(havers) if mask[at]]
            if not able:
                raise CheckpointError(f"{key} is made of parameters of several pipeline stages: {sorted(needs[key])}.")
        writer = min(able, key=lambda r: load[r])
        load[writer] += _bytes(disk[key])
        own[writer].append(key)
    return Layout(_named([list(_cut(disk, share, max_bytes)) for share in own]), frozenset(gather_all))


def write_share(staged: Path, export: Export, layout: Layout) -> None:
    """Gathers parameter by parameter and writes this rank's files. A collective; raises alike on all ranks."""
    writing = _Writing(staged, export, layout.files[rank()])
    error: Exception | None = None
    for name in export.specs:
        # Every rank of the parameter's mesh joins the gather, whoever writes, and after an error as well.
        pieces: list[tuple[Box, Tensor]] = []
        if name in export.state:
            pieces = gathered(export.state[name], name in layout.gather_all, export.slots_of.get(name))
        try:
            if error is None:
                writing.take(name, pieces)
        except Exception as raised:  # noqa: BLE001  (raised below, with the other ranks)
            error = raised
    agree(error)
    assert not writing.todo, f"keys left over: {list(writing.todo)[:3]}"


class _Writing:
    """This rank's share while parameters arrive in order: cuts out keys, writes files, drops what is done with."""

    def __init__(self, staged: Path, export: Export, files: list[tuple[str, list[str]]]):
        self.staged, self.export = staged, export
        self.todo = deque((file, key) for file, keys in files for key in keys)
        self.left = {file: len(keys) for file, keys in files}
        self.users = Counter(name for _, key in self.todo for name in export.needs[key])
        self.full: dict[str, dict[str, Tensor]] = {}

    def take(self, name: str, pieces: list[tuple[Box, Tensor]]) -> None:
        stock, needs = self.export.stock, self.export.needs
        if name not in self.users:
            return
        stock[name] = [(box, tensor.cpu()) for box, tensor in pieces]
        while self.todo and needs[self.todo[0][1]] <= stock.keys():
            file, key = self.todo.popleft()
            self.full.setdefault(file, {})[key] = self.export.disk[key].read()
            self.left[file] -= 1
            if self.left[file] == 0:
                self._write(file)
            for used in needs[key]:
                self.users[used] -= 1
                if self.users[used] == 0:
                    del stock[used]

    def _write(self, file: str) -> None:
        from safetensors.torch import save_file

        save_file(self.full.pop(file), str(self.staged / file), metadata={"format": "pt"})


def held_boxes(tensor: Tensor, slots: Slots | None = None) -> list[Box]:
    """What this rank holds after `gathered(tensor, all_axes=False)`; known without communication."""
    kept = _ep_axes(tensor)
    if not kept:
        return [whole(tensor.shape)]
    assert isinstance(tensor, DTensor)
    boxes = placed_boxes(tensor.shape, tensor.device_mesh, _gathered_placements(tensor, kept))
    # Only the boxes matter here: any tensor stands for the memory.
    return [box for box, _ in by_expert([(box, torch.empty(0)) for box in boxes], slots)]


def gathered(tensor: Tensor, all_axes: bool, slots: Slots | None = None) -> list[tuple[Box, Tensor]]:
    """What this rank holds of a parameter once its shards over all axes but `ep` are gathered, or over all axes.
    A collective of the ranks of its mesh."""
    tensor = tensor.detach()
    kept = _ep_axes(tensor)
    if all_axes or not kept:
        return local_pieces(whole_tensor(tensor, slots))
    assert isinstance(tensor, DTensor)
    if in_pieces(tensor):
        return by_expert([gather_axes(tensor, kept)], slots)
    return local_pieces(tensor.redistribute(placements=_gathered_placements(tensor, kept)), slots)


def _gathered_placements(tensor: DTensor, kept: list[int]) -> list[Placement]:
    return [one if axis in kept else Replicate() for axis, one in enumerate(tensor.placements)]


def write_index(staged: Path, export: Export, layout: Layout, num_parameters: int) -> None:
    """The index of the files; a folder of one file has none."""
    if set(layout.weight_map.values()) == {WEIGHTS}:
        return
    total = sum(_bytes(value) for value in export.disk.values())
    metadata = {"total_parameters": num_parameters, "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(layout.weight_map.items()))}
    (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _ep_axes(tensor: Tensor) -> list[int]:
    """Mesh axes over which experts are shared out, of a DTensor sharded by its dim 0 there."""
    if not isinstance(tensor, DTensor):
        return []
    names = tensor.device_mesh.mesh_dim_names or ()
    return [axis for axis, name in enumerate(names) if name == "ep" and tensor.placements[axis].is_shard(0)]


def _everyones_specs(state: Mapping[str, Tensor], slots_of: Mapping[str, Slots]) -> Specs:
    specs: Specs = {
        name: (tuple(whole_shape(tensor, slots_of.get(name))), tensor.dtype) for name, tensor in state.items()
    }
    digest = hashlib.sha256(repr(sorted(specs.items(), key=lambda item: item[0])).encode()).hexdigest()
    if len(set(everyones(digest))) > 1:  # experts in ModuleLists: each rank has names of its own
        for other in everyones(specs):
            specs = {**other, **specs}
    return dict(sorted(specs.items()))


def _leaf_names(value: LazyTensor) -> Iterator[str]:
    for source, _ in value.leaves(whole(value.sizes)):
        yield source.key


def _can_write(value: LazyTensor, held: Mapping[str, list[Box]]) -> bool:
    """Whether everything that the key is made of is held, each slice in one piece."""
    return all(
        any(contains(one, box) for one in held.get(source.key, ())) for source, box in value.leaves(whole(value.sizes))
    )


def _bytes(value: LazyTensor) -> int:
    return value.numel() * value.dtype.itemsize


def _cut(disk: Mapping[str, LazyTensor], keys: list[str], max_bytes: int) -> Iterator[list[str]]:
    """`keys` in runs of at most `max_bytes`; a key that is larger stands alone."""
    run: list[str] = []
    size = 0
    for key in keys:
        if run and size + _bytes(disk[key]) > max_bytes:
            yield run
            run, size = [], 0
        run.append(key)
        size += _bytes(disk[key])
    if run:
        yield run


def _named(runs: list[list[list[str]]]) -> list[list[tuple[str, list[str]]]]:
    total = sum(len(share) for share in runs)
    if total == 1:
        return [[(WEIGHTS, keys) for keys in share] for share in runs]
    numbers = iter(range(1, total + 1))
    return [[(f"model-{next(numbers):05d}-of-{total:05d}.safetensors", keys) for keys in share] for share in runs]
