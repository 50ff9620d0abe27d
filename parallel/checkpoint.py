"""Training checkpoints: model, optimizer, random numbers and whatever the program adds, in one folder.

Saved by all ranks at once and atomically, loaded on another number of ranks or another mesh: names are the model's own,
and shapes are those of the whole tensors. Built on torch.distributed.checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moeweave.parallel import optimizer_state as optim
from moeweave.parallel.agreement import CheckpointError, everyones, rank, together
from moeweave.parallel.checkpoint_engine import check_given, check_saved, whole, zero_of
from moeweave.parallel.checkpoint_files import (
    INDEX,
    MANIFEST,
    CheckpointFolder,
    Reader,
    check_checksum,
    checksum,
    complete_in,
    mark_complete,
    open_checkpoint,
    stored_tensors,
    write_manifest,
)
from moeweave.parallel.checkpoint_pieces import LoadPlanner, SavePlanner
from moeweave.parallel.data import shard_again
from moeweave.parallel.hf.boxes import Slots, whole_shape
from moeweave.parallel.hf.conversion import blueprint, computed_buffers, is_hugging_face
from moeweave.parallel.hf.files import is_weights_folder
from moeweave.parallel.hf.reader import load_weights
from moeweave.parallel.materialize import materialize, on_meta
from moeweave.parallel.names import listed, model_class, named_state, unwrap
from moeweave.parallel.packing import pack, tensor_names, unpack
from moeweave.parallel.placed import slots_of_params
from moeweave.parallel.rng_state import restore_rng, rng_state
from moeweave.parallel.staging import publish, remove, settle, stage

logger = logging.getLogger("moeweave")


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint says besides weights.

    Attributes:
        step: as saved; 0 for a Hugging Face folder.
        extra: what this rank passed to `save`. On another number of ranks: what rank `rank % world_size` passed.
        world_size: of the job that saved; 0 for a Hugging Face folder.
        rng_restored: random number generators go on from where they were. Not so on another number of ranks.
    """

    step: int
    extra: Any
    world_size: int
    rng_restored: bool


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    extra: Any = None,
    keep_last: int | None = None,
) -> Path:
    """Saves model, optimizer, random number generators and `extra` into the folder `path`. A collective.

    The folder appears when it is complete. A save that is interrupted leaves what was there as it was; what it leaves
    behind itself is removed by the next save into the same parent folder. A folder of that name is replaced.

    Args:
        path: the checkpoint's own folder, e.g. "run/checkpoints/step-00000100", on a file system that all ranks share.
        model: wrapped or not. optimizer: any of torch.optim, over parameters of the model.
        step: a number that grows; `latest` goes by it.
        extra: numbers, strings, lists, tuples, dicts, tensors, nested; each rank's own is kept (position in the data).
        keep_last: remove all but this many newest complete checkpoints of the parent folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: on all ranks alike, when something cannot be saved or the folder cannot be written.
    """
    folder = Path(path)
    with together():
        if keep_last is not None and keep_last < 1:
            raise CheckpointError(f"keep_last ({keep_last}) must be at least 1, or None to keep all.")
        shard_again(model)
        check_given(model, optimizer)
        own: dict[str, Tensor] = {}
        packed = pack({"extra": extra, "rng": rng_state()}, own, f"rank{rank()}", "the checkpoint's state")
        described = None
        if optimizer is not None and zero_of(model) is None:
            optimizer_state = optim.optimizer_state(model, optimizer)
            own |= optimizer_state.tensors
            described = optimizer_state.described()
    with whole(model):
        with together():
            state = {f"model/{name}": tensor for name, tensor in named_state(model).items()}
        staged = stage(folder)
        _write_tensors(staged, state | own, _slots_of(model, state | own))
    if optimizer is not None and zero_of(model) is not None:
        described = zero_of(model).describe()
        zero_of(model).save(staged)
    manifest = _gather_manifest(staged, step, packed, described)
    with together():
        if rank() == 0:
            write_manifest(staged, manifest)
            publish(staged, folder)
            mark_complete(folder)
            settle(folder)
            if keep_last is not None:
                for old in complete_in(folder.parent)[:-keep_last]:
                    remove(old.path)
    return folder


def load(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, verify: bool = True
) -> LoadedState:
    """Fills `model` (and `optimizer`) in place from a checkpoint, or the model from a Hugging Face folder.

    A collective. Each rank reads its own shards, whatever mesh saved them. A model built on meta gets memory on its
    mesh's device first. Nothing is changed unless the checkpoint is whole and fits.

    Args:
        path: what `save` returned, or a local folder with safetensors weights.
        model: wrapped or not. optimizer: new, over the same parameters; None reads none.
        verify: compare the checksums of all files, each read by one rank.

    Returns:
        Step and extra; random number generators are restored on the same number of ranks.

    Raises:
        CheckpointError: on all ranks alike. A checkpoint that is missing, incomplete, damaged or of another model;
            names and shapes that do not fit are listed.
    """
    folder = Path(path)
    shard_again(model)
    if everyones(folder.is_dir() and not (folder / MANIFEST).exists() and is_weights_folder(folder))[0]:
        if optimizer is not None:
            raise CheckpointError(f"{folder} is a Hugging Face folder and has no optimizer state. Pass optimizer=None.")
        with whole(model, write=True):
            load_weights(folder, model, _device(model))
        return LoadedState(0, None, 0, False)
    with together():
        checkpoint = open_checkpoint(folder)
        if verify:
            for at, name in enumerate(sorted(checkpoint.manifest["files"])):
                if at % _world() == rank():
                    check_checksum(checkpoint, name)
    with together():
        entries = stored_tensors(folder)
        saved = checkpoint.manifest["optimizer"]
        check_given(model, optimizer)
        if optimizer is not None:
            check_saved(model, saved)
    by_engine = zero_of(model) if optimizer is not None else None
    plain = optimizer if by_engine is None else None
    with whole(model), together():
        not_mine = _check_model(model, entries, folder)
        not_in_optimizer = set() if plain is None else optim.check_optimizer(model, plain, saved)
    _check_nothing_left(folder, "model", not_mine)
    _check_nothing_left(folder, "optimizer", not_in_optimizer)
    with whole(model, write=True):
        mine, own, moments = _read(checkpoint, model, plain, entries)
    if by_engine is not None:
        by_engine.load(folder)
    with together():
        if plain is not None:
            optim.restore_optimizer(model, plain, saved, moments)
        return _resume(checkpoint, unpack(mine, own))


def _read(
    checkpoint: CheckpointFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    entries: dict[str, TensorStorageMetadata],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Fill the model's tensors. Returns this rank's packed values, their tensors, and the optimizer's state."""
    with together():
        if on_meta(model):
            inner = unwrap(model)
            materialize(inner, _device(model), computed_buffers(blueprint(inner)) if is_hugging_face(inner) else {})
        tensors = {f"model/{name}": tensor for name, tensor in named_state(model).items()}
        moments = {} if optimizer is None else optim.templates(model, optimizer, entries)
        mine = checkpoint.manifest["ranks"][rank() % checkpoint.manifest["world_size"]]
        own = {
            name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in tensor_names(mine)
        }
    _read_tensors(checkpoint.path, tensors | moments | own, _slots_of(model, tensors | moments))
    return mine, own, moments


def _slots_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Slots]:
    """By entry of a checkpoint, the slots of placed experts: of their weights, and of optimizer state of that shape."""
    placed = slots_of_params(unwrap(model))
    found = {}
    for entry, tensor in state.items():
        name = entry.removeprefix("model/") if entry.startswith("model/") else entry.removeprefix("optimizer/")
        name = name.rpartition("/")[0] or name
        if name in placed and tensor.shape[:1] == (len(placed[name]),):
            found[entry] = placed[name]
    return found


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in `folder` (greatest step), or None. Not a collective."""
    found = complete_in(Path(folder))
    return found[-1].path if found else None


def _resume(checkpoint: CheckpointFolder, mine: dict[str, Any]) -> LoadedState:
    same = checkpoint.manifest["world_size"] == _world()
    if same:
        restore_rng(mine["rng"])
    elif rank() == 0:
        logger.warning(
            "%s was saved by %d ranks and is loaded by %d: random number generators start anew",
            checkpoint.path,
            checkpoint.manifest["world_size"],
            _world(),
        )
    return LoadedState(checkpoint.step, mine["extra"], checkpoint.manifest["world_size"], same)


def _check_model(model: nn.Module, entries: dict[str, TensorStorageMetadata], path: Path) -> set[str]:
    """The saved names that this rank's model has not. Raises CheckpointError when the model's own do not fit."""
    saved = {name.removeprefix("model/"): stored for name, stored in entries.items() if name.startswith("model/")}
    state = named_state(model)
    kind = model_class(model).__name__
    if missing := state.keys() - saved.keys():
        raise CheckpointError(
            f"{path} does not fit {kind}: it lacks {len(missing)} of the model's {len(state)} tensors: "
            f"{listed(missing, saved)}. Load it into the model that was saved."
        )
    placed = slots_of_params(unwrap(model))
    shapes = {name: whole_shape(tensor, placed.get(name)) for name, tensor in state.items()}
    other = {name: shape for name, shape in shapes.items() if saved[name].size != shape}
    for name, shape in other.items():
        raise CheckpointError(
            f"{path} does not fit {kind}: {len(other)} tensors have other shapes, the first {name}: "
            f"{tuple(saved[name].size)} there, expected {tuple(shape)}. "
            "Build the model with the sizes that were saved."
        )
    return saved.keys() - state.keys()


def _check_nothing_left(path: Path, what: str, not_mine: set[str]) -> None:
    """Raises CheckpointError for names that no rank takes. A collective."""
    if left := set.intersection(*everyones(not_mine)):
        raise CheckpointError(
            f"{path} does not fit: {len(left)} of its names are not in the {what}: {listed(left)}. "
            f"Load it into the {what} that was saved."
        )


def _gather_manifest(
    staged: Path, step: int, packed: dict[str, Any], described: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything but the tensors, of all ranks; written by rank 0. A collective."""
    text = json.dumps(described)
    as_rank_0 = everyones(_digest(text))[0] == _digest(text)
    with together():
        names = [file.name for file in staged.iterdir() if file.name.startswith(f"__{rank()}_")]
        names += [INDEX] if rank() == 0 else []
        files = {name: {"bytes": (staged / name).stat().st_size, "crc32": checksum(staged / name)} for name in names}
    ranks = everyones((files, packed, described if rank() == 0 or not as_rank_0 else None))
    descriptions = [one for _, _, one in ranks if one is not None]
    return {
        "step": step,
        "world_size": _world(),
        "torch": torch.__version__,
        "files": {name: entry for files, _, _ in ranks for name, entry in files.items()},
        "optimizer": optim.merged(descriptions) if descriptions else None,
        "ranks": [packed for _, packed, _ in ranks],
    }


def _write_tensors(staged: Path, state: dict[str, Tensor], slots_of: dict[str, Slots]) -> None:
    # A name that several ranks have whole is written by one, the others' shards by their ranks.
    with _plain_failures(f"the checkpoint could not be written to {staged.parent}"):
        writer = dcp.FileSystemWriter(staged)
        dcp.save(state, storage_writer=writer, planner=SavePlanner(slots_of), no_dist=not dist.is_initialized())


def _read_tensors(folder: Path, state: dict[str, Tensor], slots_of: dict[str, Slots]) -> None:
    with _plain_failures(f"{folder} could not be read"):
        reader, planner = Reader(folder), LoadPlanner(slots_of)
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
        planner.copy_replicas()


@contextmanager
def _plain_failures(what: str) -> Iterator[None]:
    """torch's own exception holds every rank's traceback; the first rank's error is what the user reads."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        first = min(failure.failures)
        error = failure.failures[first][0]
        raise CheckpointError(f"{what}: {type(error).__name__} on rank {first}: {error}") from failure


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _device(model: nn.Module) -> torch.device:
    record = vars(unwrap(model)).get("_moeweave")
    return torch.get_default_device() if record is None else record.mesh.device


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
