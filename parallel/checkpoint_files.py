"""What a checkpoint folder holds, how to see that it is whole, and reading it without running anything in it.

__<rank>_<n>.distcp   tensors, written by torch.distributed.checkpoint, several ranks at once
.metadata             its index: which file holds which part of which tensor
moeweave.json         everything else, with the size and checksum of every file
complete              written last, with the checksum of moeweave.json: without it the folder is no checkpoint
"""

from __future__ import annotations

import json
import logging
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.staging import sync

logger = logging.getLogger("moeweave")
MANIFEST, COMPLETE, INDEX = "moeweave.json", "complete", ".metadata"
FORMAT = 1
REMEDY = "Copy the checkpoint again, or load another one."


@dataclass(frozen=True)
class CheckpointFolder:
    """A complete checkpoint: its folder, and what moeweave.json says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def checksum(path: Path) -> str:
    """CRC-32 of a file, in hexadecimal."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **manifest}) + "\n")


def mark_complete(folder: Path) -> None:
    """The last act of a save."""
    marker = folder / COMPLETE
    part = marker.with_suffix(".part")
    part.write_text(checksum(folder / MANIFEST) + "\n")
    sync(part)
    part.rename(marker)
    sync(folder)


def open_checkpoint(path: Path) -> CheckpointFolder:
    """The checkpoint in `path`, seen to be whole by names and sizes.

    Raises CheckpointError, saying which, when it is missing, incomplete, damaged, or something else.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}.{_near(path)}")
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path} is not a checkpoint of moeweave: it has no {MANIFEST}.{_what(path)}")
    if not (path / COMPLETE).exists():
        raise CheckpointError(
            f"{path} is incomplete: its save was interrupted. Load an earlier one ({_newest_beside(path)})."
        )
    if (path / COMPLETE).read_text().strip() != checksum(path / MANIFEST):
        raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum is not that in {COMPLETE!r}. {REMEDY}")
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version of moeweave reads {FORMAT}. Load it with the "
            "version that saved it, and export the model from there with save_pretrained."
        )
    for name, expected in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != expected["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes, expected {expected['bytes']}"
            raise CheckpointError(f"{file} {state}. {REMEDY}")
    return CheckpointFolder(path, manifest)


def check_checksum(folder: CheckpointFolder, name: str) -> None:
    """Raises CheckpointError when the bytes of a file are not those that were written."""
    found, expected = checksum(folder.path / name), folder.manifest["files"][name]["crc32"]
    if found != expected:
        raise CheckpointError(f"{folder.path / name} is damaged: checksum {found}, expected {expected}. {REMEDY}")


def complete_in(parent: Path) -> list[CheckpointFolder]:
    """The complete checkpoints directly in `parent`, oldest step first; damaged ones are passed over with a warning."""
    found = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if path.is_dir() and not path.name.startswith(".") and (path / COMPLETE).exists():
            try:
                found.append(open_checkpoint(path))
            except (CheckpointError, OSError) as error:
                logger.warning("passed over: %s", error)
    return sorted(found, key=lambda one: (one.step, (one.path / COMPLETE).stat().st_mtime_ns))


class Reader(dcp.FileSystemReader):
    """Reads the index, which torch pickles, with nothing but the index's own classes allowed."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(path: Path) -> Metadata:
    """The index of a checkpoint folder. Raises CheckpointError when it is not one."""
    try:
        with (path / INDEX).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ValueError,
        IndexError,
        TypeError,
        KeyError,
    ) as error:
        raise CheckpointError(
            f"{path / INDEX} cannot be read as the index of a checkpoint: {error}. {REMEDY}"
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path / INDEX} is not the index of a checkpoint. {REMEDY}")
    pickled = [name for name, one in metadata.state_dict_metadata.items() if not isinstance(one, TensorStorageMetadata)]
    if pickled:
        raise CheckpointError(
            f"{path / INDEX} lists pickled objects ({pickled[0]}), which moeweave never saves or reads. {REMEDY}"
        )
    return metadata


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and pieces of every tensor in a checkpoint folder, by name."""
    return dict(read_index(path).state_dict_metadata)  # type: ignore[arg-type]


class _IndexUnpickler(pickle.Unpickler):
    _ALLOWED: ClassVar[dict[str, set[str]]] = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which an index never does")


def _what(path: Path) -> str:
    """What else a folder may be."""
    if (path / INDEX).exists():
        return " It holds a checkpoint that another program wrote with torch.distributed.checkpoint; load it with that."
    if inside := complete_in(path):
        return f" It holds {len(inside)} of them; the newest is {inside[-1].path} (mw.latest finds it)."
    names = sorted(entry.name for entry in path.iterdir())
    return f" It holds {', '.join(names[:6]) + (', ...' if len(names) > 6 else '') if names else 'nothing'}."


def _near(path: Path) -> str:
    beside = complete_in(path.parent)
    return f" Beside it there are {', '.join(one.path.name for one in beside[-3:])}." if beside else ""


def _newest_beside(path: Path) -> str:
    beside = complete_in(path.parent)
    return f"the newest complete one is {beside[-1].path}" if beside else "there is none beside it"
