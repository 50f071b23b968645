"""Tensors in safetensors files, single or sharded."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_jax.errors import InputError, brief, reason_of

__all__ = [
    "INDEX",
    "WEIGHTS",
    "base_hash",
    "open_tensors",
    "save_tensors",
    "shards_of",
    "write_tensors",
]

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_FILE = re.compile(r"\w[\w.+=-]{0,200}\.safetensors")


def open_tensors(folder: str | Path) -> dict[str, Any]:
    """Returns the open file that holds each tensor of a folder, by tensor name.

    Nothing is read before `file.get_tensor(name)`.

    Raises:
      InputError: if the folder has no safetensors file, misses one that its index
        names, or has one, or an index, that is damaged, or if the index and the files
        disagree on where a tensor is.
    """
    folder = Path(folder)
    files = {path.name: _open(path) for path in _weight_files(folder)}
    held = {name: sorted(file.keys()) for name, file in files.items()}
    found = {tensor: name for name in held for tensor in held[name]}
    if WEIGHTS not in files:
        index = folder / INDEX
        for tensor, name in _indexed(index).items():
            if tensor not in held[name]:
                raise InputError(
                    f"`{folder / name}` must hold the tensor {tensor!r}, as "
                    f"`{index.name}` says, and does not. Copy the folder again."
                )
            found[tensor] = name
    return {tensor: files[name] for tensor, name in found.items()}


def shards_of(index: Path) -> list[str]:
    """Returns the names of the files in an index, sorted.

    Raises:
      InputError: if it is no index, or names anything but files beside it.
    """
    return sorted(set(_indexed(index).values()))


def write_tensors(tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """Writes tensors to one file, marked as PyTorch's layout for transformers."""
    # safetensors writes the memory of an array, whatever the strides say.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


def save_tensors(
    tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]
) -> None:
    """Writes a safetensors file, which others may read if they may other new files."""
    # From version 0.8 on safetensors writes files that only their owner may read.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def base_hash(folder: str | Path) -> str:
    """Returns the SHA-256 of the safetensors files of a folder, in hexadecimal.

    The files are read in the order of their names, so the value does not depend on
    where the folder lies.

    Raises:
      InputError: if the folder has no safetensors file.
    """
    digest = hashlib.sha256()
    for path in _weight_files(Path(folder)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> Any:
    """Opens one safetensors file."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"`{path}` must be a complete safetensors file: {reason_of(error)}. "
            "Copy it again."
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder, by name."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise InputError(_no_weights(folder))
    paths = [folder / name for name in shards_of(index)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"`{folder}` must hold every file that `{index.name}` names, but misses "
            f"{', '.join(missing)}. Copy the folder again."
        )
    return paths


def _indexed(index: Path) -> dict[str, str]:
    """Returns the file of every tensor in an index."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(files.values()))
    except (
        OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError
    ) as error:  # fmt: skip
        raise InputError(
            f"`{index}` must be JSON with a `weight_map` from tensors to files: "
            f"{reason_of(error)}. Copy it again."
        ) from error
    for name in names:
        # Anything else could lead out of the folder, to files of somebody else.
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise InputError(
                f"`weight_map` in `{index}` must name safetensors files beside it, got "
                f"{brief(name)}. Copy it again from where you trust it."
            )
    return files


def _no_weights(folder: Path) -> str:
    """Returns the message for a folder without safetensors."""
    rule = f"`model` must be a folder with a `{WEIGHTS}`, got `{folder}`"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if not pickles:
        return (
            f"{rule}, which has no weights of this kind. Save them with "
            "`save_pretrained`, which writes safetensors."
        )
    return (
        f"{rule}, which has only the pickle {pickles[0]}; loading a pickle runs the "
        "code in it. Convert it: load the model in PyTorch and call "
        "`save_pretrained(folder, safe_serialization=True)`."
    )
