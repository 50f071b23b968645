"""The adapter file: what was trained, and nothing else."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_jax.errors import InputError

__all__ = ["ADAPTER", "FORMAT", "Adapter", "load_adapter", "save_adapter"]

ADAPTER = "adapter.safetensors"
FORMAT = "sparse_jax adapter 1"

_KEY = "sparse_jax"  # of the metadata of a safetensors file
_WORDS = ("method", "base_model", "base_hash", "task")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Adapter:
    """Trained values, absolute ones, so that loading restores every bit.

    Example:
      >>> adapter = Adapter(
      ...     support={"w": np.array([0, 3], np.int32)},
      ...     values={"w": np.array([1.0, 2.0], np.float32)},
      ... )
      >>> adapter.entries
      2
    """

    support: Arrays = field(default_factory=dict)  # leaf: (k,) or (L, k), int32
    values: Arrays = field(default_factory=dict)  # leaf: as its support, base dtype
    dense: Arrays = field(default_factory=dict)  # leaf: the whole array, base dtype
    added: dict[str, Arrays] = field(
        default_factory=dict
    )  # site: {part: array}, float32
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method
    base_model: str = ""
    base_hash: str = ""  # SHA-256 of the base's weights, hexadecimal
    task: str = ""
    labels: tuple[str, ...] = ()  # empty for regression

    @property
    def entries(self) -> int:
        """Numbers in the file that are not positions."""
        arrays = [*self.values.values(), *self.dense.values()]
        arrays += [array for parts in self.added.values() for array in parts.values()]
        return sum(array.size for array in arrays)


def save_adapter(path: str | Path, adapter: Adapter) -> int:
    """Writes an adapter, whole or not at all.

    A sparse leaf takes 4 bytes a position and the base's bytes a value: 6 in all with
    bfloat16.

    Args:
      path: file to write.
      adapter: what was trained.

    Returns:
      Bytes of the file.
    """
    path = Path(path)
    tensors = {f"{name}.support": array for name, array in adapter.support.items()}
    tensors |= {f"{name}.values": array for name, array in adapter.values.items()}
    tensors |= adapter.dense
    for site, parts in adapter.added.items():
        tensors |= {f"added/{site}/{part}": array for part, array in parts.items()}
    # safetensors writes the memory of an array, whatever the strides say.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    temporary = path.with_name(f".{path.name}.part")
    save_file(tensors, temporary, metadata=_to_metadata(adapter))
    os.replace(temporary, path)
    return path.stat().st_size


def load_adapter(path: str | Path) -> Adapter:
    """Reads an adapter.

    Args:
      path: adapter file, or the run directory that holds one.

    Raises:
      InputError: if there is no such file, or if it is truncated, of another format,
        or holds supports that are not ascending positions.
    """
    path = Path(path)
    path = path / ADAPTER if path.is_dir() else path
    metadata, tensors = _read(path)
    words = json.loads(metadata.get(_KEY, "{}"))
    if words.get("format") != FORMAT:
        raise InputError(
            f"`{path}` must be an adapter of format {FORMAT!r}, got "
            f"{words.get('format')!r}. Write it with `save_adapter`."
        )
    try:
        adapter = _from_tensors(tensors, words)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"`{path}` must name its method, base and tensors, but {error} is missing "
            "or malformed. Copy it again."
        ) from error
    for name in sorted({*adapter.support, *adapter.values}):
        _require_support(path, name, adapter)
    return adapter


def _to_metadata(adapter: Adapter) -> dict[str, str]:
    """Returns what is not an array, as one string.

    safetensors writes several in an order of its own, so that equal adapters would
    be unequal files.
    """
    words = {name: getattr(adapter, name) for name in (*_WORDS, "settings", "labels")}
    return {_KEY: json.dumps({"format": FORMAT, **words}, sort_keys=True)}


def _read(path: Path) -> tuple[dict[str, str], Arrays]:
    """Returns the metadata and the tensors of a safetensors file."""
    if not path.is_file():
        raise InputError(
            f"`adapter` must be a file or a run directory with `{ADAPTER}`, got "
            f"`{path}`, which does not exist."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, struct.error, OSError) as error:
        raise InputError(
            f"`{path}` must be a complete safetensors file: {error}. Copy it again."
        ) from error


def _from_tensors(tensors: Arrays, words: Mapping[str, Any]) -> Adapter:
    """Sorts tensors by what their names say."""
    support, values, dense, added = {}, {}, {}, {}
    for name, array in tensors.items():
        if name.startswith("added/"):
            site, _, part = name.removeprefix("added/").rpartition("/")
            added.setdefault(site, {})[part] = array
        elif name.endswith(".support"):
            support[name.removesuffix(".support")] = array
        elif name.endswith(".values"):
            values[name.removesuffix(".values")] = array
        else:
            dense[name] = array
    return Adapter(
        support, values, dense, added,
        settings=words["settings"],
        labels=tuple(words["labels"]),
        **{name: words[name] for name in _WORDS},
    )  # fmt: skip


def _require_support(path: Path, name: str, adapter: Adapter) -> None:
    """Raises unless a leaf has ascending positions and as many values."""
    support, values = adapter.support.get(name), adapter.values.get(name)
    if support is None or values is None or support.shape != values.shape:
        raise InputError(
            f"`{name}` in `{path}` must have as many positions as values. "
            "Copy it again."
        )
    is_sorted = support.dtype == np.int32 and (np.diff(support) > 0).all()
    if not is_sorted or (support < 0).any():
        raise InputError(
            f"`{name}.support` in `{path}` must hold ascending int32 positions. "
            "Copy it again."
        )
