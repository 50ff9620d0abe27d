"""Token sources: what `data.path` names becomes one long array of tokens.

    .txt            the file's bytes are the tokens (mapped, not read)
    .jsonl          the bytes of one field of every line, lines joined by a zero byte (read into memory)
    .npy            a NumPy array of uint16 or uint32 (mapped)
    .bin            raw uint16 or uint32 numbers of this machine's byte order (mapped)
    null            the Python reference text in pydoc_data.topics, which every CPython carries

Shape legend: N tokens of the source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeweave.launch.schema import ConfigError, DataConfig

BYTES = 256
SUFFIXES = (".txt", ".jsonl", ".npy", ".bin")


@dataclass(frozen=True)
class Tokens:
    """ids_N (uint8, uint16 or uint32), where they come from, and the vocabulary they need where that is known."""

    ids_N: np.ndarray
    source: str
    num_ids: int | None

    def __len__(self) -> int:
        return len(self.ids_N)


def open_tokens(config: DataConfig) -> Tokens:
    """Opens the source. Raises ConfigError for a missing file, an unknown kind, or content that is not tokens."""
    if config.path is None:
        return Tokens(_python_reference(), "pydoc_data.topics", BYTES)
    path = Path(config.path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"data.path={path}: must end in one of {', '.join(SUFFIXES)}. Convert it, or rename it.")
    if not path.is_file():
        what = "is no file" if path.exists() else "no such file"
        raise ConfigError(f"data.path={path}: {what}; {_listing(path.parent)}. Correct the path.")
    if path.suffix == ".txt":
        return Tokens(_mapped(path, np.uint8), str(path), BYTES)
    if path.suffix == ".jsonl":
        return Tokens(_json_lines(path, config.field), str(path), BYTES)
    if path.suffix == ".npy":
        return Tokens(_array(path), str(path), None)
    return Tokens(_mapped(path, np.dtype(config.dtype)), str(path), None)


def check(tokens: Tokens, vocab_size: int | None, seq_length: int) -> None:
    """Raises ConfigError when the source is shorter than one sequence, or needs more ids than the model has."""
    if len(tokens) < seq_length:
        raise ConfigError(
            f"data.path={tokens.source}: has {len(tokens)} tokens, fewer than data.seq_length={seq_length}. "
            "Use more text, or shorter sequences."
        )
    if vocab_size is not None and tokens.num_ids is not None and tokens.num_ids > vocab_size:
        raise ConfigError(
            f"data.path={tokens.source}: its tokens are bytes, 0 to {tokens.num_ids - 1}, but the model has only "
            f"{vocab_size} ids. Set model.overrides.vocab_size={tokens.num_ids} or more."
        )


def check_ids(ids: np.ndarray, vocab_size: int | None, source: str) -> None:
    """Raises ValueError when a batch holds an id that the model has no embedding for."""
    if vocab_size is not None and ids.size and int(ids.max()) >= vocab_size:
        raise ValueError(
            f"data.path={source}: holds token {int(ids.max())}, but the model has ids 0 to {vocab_size - 1}. "
            "Use the tokenizer that belongs to the model, or check data.dtype."
        )


def _python_reference() -> np.ndarray:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _mapped(path: Path, dtype: np.dtype | type) -> np.ndarray:
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0:
        raise ConfigError(f"data.path={path}: the file is empty. Use one with text or tokens.")
    if size % width:
        raise ConfigError(
            f"data.path={path}: its {size} bytes are no whole number of {np.dtype(dtype).name}. Set data.dtype."
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _array(path: Path) -> np.ndarray:
    try:
        ids_N = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"data.path={path}: not a NumPy array ({error}). Save it with numpy.save.") from error
    if ids_N.ndim != 1 or ids_N.dtype not in (np.uint16, np.uint32):
        raise ConfigError(
            f"data.path={path}: is {ids_N.dtype} of shape {ids_N.shape}, must be one row of uint16 or uint32. "
            "Convert it with .ravel().astype(numpy.uint16)."
        )
    return ids_N


def _json_lines(path: Path, field: str) -> np.ndarray:
    texts = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                texts.append(json.loads(line)[field])
            except json.JSONDecodeError as error:
                raise ConfigError(f"data.path={path}: line {number} is not JSON ({error.msg}). Correct it.") from error
            except UnicodeDecodeError as error:
                raise ConfigError(f"data.path={path}: line {number} is not UTF-8. Convert the file.") from error
            except (KeyError, TypeError) as error:
                raise ConfigError(f"data.path={path}: line {number} has no field {field!r}. Set data.field.") from error
            if not isinstance(texts[-1], str):
                raise ConfigError(f"data.path={path}: line {number}: field {field!r} is no text. Set data.field.")
    return np.frombuffer("\0".join(texts).encode(), dtype=np.uint8)


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist either"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{folder} holds {shown or 'nothing of these kinds'}"
