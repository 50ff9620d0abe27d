"""A folder in the Hugging Face format: config.json and weights in safetensors files, read by slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.hf.boxes import Box, box_shape, box_slices
from moeweave.parallel.hf.lazy import LazySource

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def is_weights_folder(path: Path) -> bool:
    """Whether `path` looks like a folder in the Hugging Face format, sound or not."""
    return any((path / name).exists() for name in (WEIGHTS, INDEX, "config.json")) or any(path.glob("*.safetensors"))


class WeightsFolder:
    """The tensors of a folder, opened and not read.

    Attributes:
        path: the folder.
        sources: a lazy tensor per key.
        bytes_read, keys_read: what has been asked of the files so far.

    Raises:
        CheckpointError: no weights, a shard that the index names is missing, a damaged file, a key that the index
            promises and its file lacks.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sources: dict[str, LazySource] = {}
        self.file_of: dict[str, str] = {}
        self.bytes_read = 0
        self.keys_read: set[str] = set()
        promised = _promised(path)
        for name in sorted(set(promised.values())) if promised else [WEIGHTS]:
            self._open(name)
        for key, name in promised.items():
            if self.file_of.get(key) != name:
                raise CheckpointError(
                    f"{path / INDEX} says that {key!r} is in {name}, which does not hold it. "
                    "Copy the folder again; its files do not belong together."
                )

    def _open(self, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        file = self.path / name
        try:
            handle = safe_open(str(file), framework="pt", device="cpu").__enter__()
            entries = [(key, handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a readable safetensors file ({error}). It may be cut short or of another format; "
                "copy or download it again."
            ) from error
        for key, part in entries:
            if part.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{file}: {key!r} has dtype {part.get_dtype()}, expected one of {list(_DTYPES)}.")
            dtype = _DTYPES[part.get_dtype()]
            self.file_of[key] = name
            self.sources[key] = LazySource.of(key, part.get_shape(), dtype, self._reader(key, part, dtype))

    def _reader(self, key: str, part: Any, dtype: torch.dtype) -> Any:
        def read_box(box: Box) -> Tensor:
            shape = box_shape(box)
            size = torch.Size(shape).numel() * dtype.itemsize
            self.keys_read.add(key)
            self.bytes_read += size
            if size == 0:
                return torch.empty(shape, dtype=dtype)
            return part[box_slices(box)] if shape else part[...]

        return read_box

    @property
    def total_bytes(self) -> int:
        return sum(source.numel() * source.dtype.itemsize for source in self.sources.values())


def _promised(path: Path) -> dict[str, str]:
    """Key to file name as the index says; empty when the folder has a single file and no index."""
    index = path / INDEX
    if not index.exists():
        if (path / WEIGHTS).exists():
            return {}
        found = sorted(entry.name for entry in path.iterdir())
        legacy = any(name.endswith((".bin", ".pt", ".pth")) for name in found)
        remedy = (
            "Its weights are in a pickle format, which is not read: load it with transformers and save_pretrained() it."
            if legacy
            else f"It holds {', '.join(found[:8]) or 'nothing'}."
        )
        raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}. {remedy}")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        promised = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files ({error!r}). Copy it again.") from error
    missing = sorted({name for name in promised.values() if not (path / name).exists()})
    if missing:
        key = next(key for key, name in promised.items() if name == missing[0])
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the {len(set(promised.values()))} files that {INDEX} names: "
            f"{', '.join(missing[:5])} (with {key!r}). Copy the missing files into the folder."
        )
    return promised
