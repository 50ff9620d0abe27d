"""Fills a wrapped model from a Hugging Face folder, each rank reading the slices that it holds and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.parallel.agreement import CheckpointError, everyones, rank, together
from moeweave.parallel.hf.boxes import local_pieces, whole_shape
from moeweave.parallel.hf.conversion import (
    Reading,
    blueprint,
    computed_buffers,
    ignorable,
    is_hugging_face,
    oddity,
    plan_reading,
)
from moeweave.parallel.hf.files import WeightsFolder
from moeweave.parallel.hf.peft_files import has_adapters
from moeweave.parallel.materialize import materialize, on_meta
from moeweave.parallel.names import copied_names, listed, model_class, named_state, tied_groups, unwrap
from moeweave.parallel.placed import slots_of_params

logger = logging.getLogger("moeweave")


def load_weights(path: Path, model: nn.Module, device: torch.device | str) -> None:
    """Reads the folder's weights into `model`, in place. A collective: every rank calls it, and all raise alike.

    A transformers model is read through transformers' conversion mapping; for any other one the keys are its names.
    Meta parameters and buffers get memory on `device` first, once the folder is known to fit.

    Raises:
        CheckpointError: a damaged folder; names that the folder lacks; another shape; tied weights that differ.
    """
    model = unwrap(model)
    with together():
        if has_adapters(model):
            raise CheckpointError(
                f"{path} holds a whole model, and {model_class(model).__name__} adapts one. "
                "Load it into the model first, then add the adapters and call parallelize."
            )
        folder = WeightsFolder(path)
        twin = blueprint(model) if is_hugging_face(model) else None
        reading = _by_name(folder) if twin is None else plan_reading(twin, folder.sources, folder.path)
        for here, there in copied_names(model).items():
            if here not in reading.values and there in reading.values:
                reading.values[here], reading.keys[here] = reading.values[there], reading.keys[there]
        _check_fit(model, folder, reading, (lambda name: False) if twin is None else ignorable(twin, "missing"))
        if on_meta(model):
            materialize(model, device, {} if twin is None else computed_buffers(twin))
    _warn_unexpected(model, folder, reading, twin)
    with together(), torch.no_grad():
        state, placed = named_state(model), slots_of_params(model)
        for names in tied_groups(model):
            _check_tied(folder, reading, state, [name for name in names if name in reading.values])
        for name, tensor in state.items():
            if name in reading.values:
                for box, view in local_pieces(tensor, placed.get(name)):
                    reading.values[name].fill(view, box)
    if twin is not None:
        model._weight_conversions = reading.conversions  # type: ignore[assignment]
    logger.info("read %.1f of %.1f MB of %s", folder.bytes_read / 1e6, folder.total_bytes / 1e6, path)


def _by_name(folder: WeightsFolder) -> Reading:
    return Reading(dict(folder.sources), {key: [key] for key in folder.sources}, [], [])


def _check_fit(model: nn.Module, folder: WeightsFolder, reading: Reading, may_miss: Callable[[str], bool]) -> None:
    state, placed = named_state(model), slots_of_params(model)
    there = {name for names in tied_groups(model) if any(name in reading.values for name in names) for name in names}
    missing = [name for name in state if name not in reading.values and name not in there and not may_miss(name)]
    if missing:
        raise CheckpointError(
            f"{folder.path} does not fit {model_class(model).__name__}: it lacks {len(missing)} of the model's "
            f"{len(state)} tensors: {listed(missing, [*reading.values, *reading.unexpected])}. "
            "Build the model from this folder's own config.json, or name the folder of this model."
        )
    for name, tensor in state.items():
        value, shape = reading.values.get(name), whole_shape(tensor, placed.get(name))
        if value is not None and value.shape != shape:
            keys = reading.keys[name]
            where = f"{folder.path / folder.file_of[keys[0]]}: {keys[0]!r}"
            if len(keys) > 1:
                where += f" and {len(keys) - 1} more keys up to {keys[-1]!r} make"
            raise CheckpointError(
                f"{where} {name} of shape {tuple(value.shape)}, expected {tuple(shape)}."
                f"{oddity(keys, folder.sources)} The folder is of another {model_class(model).__name__}, or damaged: "
                "build the model from its config.json."
            )


def _check_tied(folder: WeightsFolder, reading: Reading, state: dict[str, Tensor], names: list[str]) -> None:
    """Tied weights that the folder holds more than once must be the same there."""
    for other in names[1:]:
        for box, _ in local_pieces(state[names[0]]):
            if not torch.equal(reading.values[names[0]].read(box), reading.values[other].read(box)):
                raise CheckpointError(
                    f"{folder.path}: {names[0]} and {other} are one weight in the model and differ in the folder. "
                    "Build the model with tie_word_embeddings=False."
                )


def _warn_unexpected(model: nn.Module, folder: WeightsFolder, reading: Reading, twin: Any) -> None:
    """Keys that no rank's model takes are passed over, as transformers does; said once."""
    names = set(named_state(model))
    own = {key for name in names & set(reading.values) for key in reading.keys[name]}
    mine_not = set(folder.sources) - own
    unused = set.intersection(*everyones(mine_not))
    if twin is not None:
        passes = ignorable(twin, "unexpected")
        unused = {key for key in unused if not passes(key)}
    if unused and rank() == 0:
        logger.warning("%s: %d keys are not used: %s", folder.path, len(unused), listed(unused, names))
