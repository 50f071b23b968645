"""Tensors in safetensors files, single or sharded."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_jax.errors import InputError, brief, reason_of

__all__ = [
    "INDEX",
    "LazyTensor",
    "WEIGHTS",
    "base_hash",
    "bytes_of",
    "open_tensors",
    "save_tensors",
    "shards_of",
    "write_tensors",
]

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_FILE = re.compile(r"\w[\w.+=-]{0,200}\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMG]i?B|)", re.IGNORECASE)
_UNITS = {
    "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


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


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor to write, which is made when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    tensors: Mapping[str, LazyTensor], folder: Path, shard_size: int | None = None
) -> None:
    """Writes tensors, marked as PyTorch's layout for transformers.

    One tensor at a time is in memory.

    Args:
      tensors: by their names.
      folder: that gets `model.safetensors`, or shards of it and their index.
      shard_size: most bytes of a file, if no tensor is larger; None is one file.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    room = shard_size
    for name, tensor in tensors.items():
        if room is not None and tensor.size > room and shards[-1]:
            shards.append({})
            room = shard_size
        shards[-1][name] = tensor
        room = None if room is None else room - tensor.size
    # What an earlier model left there would be read in place of this one.
    for old in (WEIGHTS, INDEX):
        (folder / old).unlink(missing_ok=True)
    if len(shards) == 1:
        _write_file(folder / WEIGHTS, shards[0])
        return
    files = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard)
        files |= dict.fromkeys(shard, name)
    total = sum(tensor.size for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def bytes_of(size: int | str) -> int:
    """Returns a number of bytes, or that of a text such as 5GB.

    Raises:
      InputError: if it is neither.

    Example:
      >>> bytes_of("5GB"), bytes_of("1.5 MiB")
      (5000000000, 1572864)
    """
    found = _SIZE.fullmatch(str(size).strip())
    number = 0
    if found is not None:
        number = int(float(found[1]) * _UNITS[found[2].upper()])
    if number < 1:
        raise InputError(
            f"`shard_size` must be a positive number of bytes, KB, MB, GB, KiB, MiB or "
            f"GiB, got {brief(size)}. Write 5GB for files of at most 5e9 bytes."
        )
    return number


def _write_file(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a safetensors file, one tensor at a time.

    The library's writer wants all of them in memory, and copies them once more.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.size
        header[name] = {
            "dtype": _CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            # The memory of an array is what is written, whatever the strides say.
            array = np.ascontiguousarray(tensor.make())
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
            file.write(array.reshape(-1).view(np.uint8).data)


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
                f"`weight_map` in `{index}` must name safetensors files next to it, "
                f"got {brief(name)}. Copy it again from where you trust it."
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
