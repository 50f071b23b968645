"""Checkpoint files: arrays and what they belong to, all of it under checksums."""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from sparse_jax.models.tensors import save_tensors

__all__ = [
    "Part",
    "Position",
    "Record",
    "has_parts",
    "read_arrays",
    "read_record",
    "write_parts",
]

_FORMAT = "sparse_jax checkpoint 1"
_KEY = "sparse_jax"  # of the metadata of a safetensors file


class Position(NamedTuple):
    """Where a run stands between two batches."""

    batches: int = 0  # used so far
    skipped: int = 0  # of these, because their gradient was not finite
    is_selected: bool = False  # whether the supports are chosen


class Part(NamedTuple):
    """What a process holds of an array."""

    leaf: int  # which array
    start: tuple[int, ...]  # of the part, in every dimension
    array: np.ndarray


@dataclass(frozen=True)
class Record:
    """What the arrays of a checkpoint are, and which run they belong to."""

    position: Position
    names: list[str]  # place of each array in the state; none if that is not known
    shapes: list[list[int]]
    dtypes: list[str]
    cuts: dict[str, Any]  # leaf: names and counts of its `Cut`
    processes: int = 1  # each of them wrote a file
    run: str = ""  # SHA-256 of its settings, model and data; empty if not known
    rows: str = ""  # SHA-256 of the rows before it; empty if not known


def has_parts(folder: Path, processes: int = 1) -> bool:
    """Returns whether a folder has the files of so many processes."""
    return all(_file(folder, process).is_file() for process in range(processes))


def write_parts(
    folder: Path, process: int, record: Record, parts: Sequence[Part]
) -> None:
    """Writes what a process holds, whole or not at all.

    Raises:
      OSError: if it cannot be written; or a `SafetensorError`.
    """
    tensors = {str(i): _bytes(part.array) for i, part in enumerate(parts)}
    told = {
        **asdict(record),
        "position": record.position._asdict(),
        "process": process,
        "parts": [[part.leaf, part.start, part.array.shape] for part in parts],
        "checksums": [zlib.crc32(tensor.data) for tensor in tensors.values()],
    }
    words = {"format": _FORMAT, "digest": _digest(told), **told}
    path = _file(folder, process)
    temporary = path.with_name(f".{path.name}.part")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_tensors(tensors, temporary, {_KEY: json.dumps(words)})
        # The name must not reach the disk before the content does.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(folder: Path) -> Record:
    """Reads what a checkpoint is.

    Raises:
      ValueError: or any other error, if a file of it is damaged.
    """
    return _record(_read(folder, 0)[0])


def read_arrays(folder: Path, record: Record) -> list[np.ndarray]:
    """Reads the arrays of a checkpoint, put together of the parts of all processes.

    Raises:
      ValueError: or any other error, if a file of it is damaged.
    """
    shapes = zip(record.shapes, record.dtypes, strict=True)
    arrays = [np.empty(shape, np.dtype(dtype)) for shape, dtype in shapes]
    found = [0] * len(arrays)
    for process in range(record.processes):
        told, tensors = _read(folder, process)
        # Only the first process knows the rows.
        own = replace(_record(told), rows=record.rows)
        if own != record or told["process"] != process:
            raise ValueError("its files belong to different checkpoints")
        pieces = zip(told["parts"], told["checksums"], tensors, strict=True)
        for (leaf, start, shape), checksum, tensor in pieces:
            if zlib.crc32(tensor.data) != checksum:
                raise ValueError("its arrays are not those that were written")
            array = tensor.view(arrays[leaf].dtype).reshape(shape)
            place = [slice(a, a + n) for a, n in zip(start, shape, strict=True)]
            arrays[leaf][tuple(place)] = array
            found[leaf] += array.size
    if found != [array.size for array in arrays]:
        raise ValueError("it has not all parts of its arrays")
    return arrays


def _file(folder: Path, process: int) -> Path:
    """Returns the file of a process."""
    return folder / f"{process}.safetensors"


def _read(folder: Path, process: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Returns what a file says, which is what was written, and its bytes."""
    with safe_open(_file(folder, process), framework="numpy") as file:
        words = json.loads((file.metadata() or {})[_KEY])
        names = sorted(file.keys(), key=int)
        tensors = [file.get_tensor(name) for name in names]
    if words.pop("format") != _FORMAT:
        raise ValueError("another version of the program wrote it")
    if words.pop("digest") != _digest(words):
        raise ValueError("it does not say what was written")
    return words, tensors


def _record(told: Mapping[str, Any]) -> Record:
    """Returns the record in a file."""
    fields = {name: told[name] for name in Record.__dataclass_fields__}
    return Record(**{**fields, "position": Position(**told["position"])})


def _bytes(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array: safetensors has not all of its types."""
    return np.frombuffer(array.tobytes(), np.uint8)


def _digest(told: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of what a file says."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
