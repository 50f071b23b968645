"""Tensors in safetensors files, single or sharded."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_jax.errors import InputError

__all__ = ["WEIGHTS", "base_hash", "open_tensors", "write_tensors"]

WEIGHTS = "model.safetensors"


def open_tensors(folder: str | Path) -> dict[str, Any]:
    """Returns the open file that holds each tensor of a folder, by tensor name.

    Nothing is read before `file.get_tensor(name)`.

    Raises:
      InputError: if the folder has no safetensors file, misses one that its index
        names, or has one, or an index, that is damaged.
    """
    files = [_open(path) for path in _weight_files(Path(folder))]
    return {name: file for file in files for name in sorted(file.keys())}


def write_tensors(tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """Writes tensors to one file, marked as PyTorch's layout for transformers."""
    # safetensors writes the memory of an array, whatever the strides say.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


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
    except SafetensorError as error:
        raise InputError(
            f"`{path}` must be a complete safetensors file: {error}. Copy it again."
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder, by name."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        raise InputError(_no_weights(folder))
    paths = [folder / name for name in _indexed(index)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"`{folder}` must hold every file that `{index.name}` names, but misses "
            f"{', '.join(missing)}. Copy the folder again."
        )
    return paths


def _indexed(index: Path) -> list[str]:
    """Returns the names of the files in an index, sorted."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted(set(names))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"`{index}` must be JSON with a `weight_map` from tensors to files: "
            f"{error}. Copy it again."
        ) from error


def _no_weights(folder: Path) -> str:
    """Returns the message for a folder without safetensors."""
    rule = f"`model` must be a folder with a `{WEIGHTS}`, got `{folder}`"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if not pickles:
        return f"{rule}, which has no weights. Save them with `save_pretrained`."
    return (
        f"{rule}, which has only the pickle {pickles[0]}; loading a pickle runs the "
        "code in it. Convert it: load the model in PyTorch and call "
        "`save_pretrained(folder, safe_serialization=True)`."
    )
