"""The adapter file: what was trained, and nothing else."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from sparse_jax.adapter.adapter import (
    Adapter,
    Arrays,
    require_no_settings,
    require_pair,
)
from sparse_jax.adapter.format_1 import FORMAT_1, method_of_format_1
from sparse_jax.errors import InputError, brief, printable, reason_of
from sparse_jax.methods.lookup import entry_of, word_of
from sparse_jax.methods.method import Method
from sparse_jax.models.hf.model_files import PEFT_CONFIG, require_no_peft
from sparse_jax.models.hf.tensors import save_tensors
from sparse_jax.models.hf.weights import is_finite
from sparse_jax.params.fields import JSON_RULES, TEXTS

__all__ = [
    "ADAPTER",
    "FORMAT",
    "adapter_digest",
    "load_adapter",
    "replacing",
    "save_adapter",
]

ADAPTER = "adapter.safetensors"
FORMAT = "sparse_jax adapter 2"

_KEY = "sparse_jax"  # of the metadata of a safetensors file
_WORDS = ("base_model", "base_hash", "task", "license")
_POSITIONS, _VALUES, _ADDED = ".support", ".values", "added/"
_DTYPES = ("float32", "bfloat16", "float16", "float64")  # of the base
# As safetensors writes them; those that no adapter has are refused by name later.
_CODES = {
    "BOOL": "bool", "BF16": "bfloat16",
    **{f"{kind}{8 * n}": f"{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": f"f{n}" for n in (2, 4, 8)},
}  # fmt: skip

# key -> type, and its name in messages
_TYPES = {
    **{name: (str, "text") for name in ("method", *_WORDS)},
    "method_settings": (dict | None, "an object or null"),
    **dict.fromkeys(("base_config", "base_leaves"), (dict, "an object")),
    "settings": (dict, "an object"),
    "labels": (list, "a list of texts"),
}
_ARE_TEXTS = lambda value: isinstance(value, list) and JSON_RULES[TEXTS][0](value)
_are_pairs = lambda value: isinstance(value, dict) and _ARE_TEXTS([*value.values()])
# setting of a run -> whether a value is valid, and the rule in messages
_RULES = {
    **dict.fromkeys(("learning_rate", "held_out"), JSON_RULES[float]),
    **dict.fromkeys(("batch_size", "max_length"), JSON_RULES[int]),
    **dict.fromkeys(("packing", "drop_unlabeled"), JSON_RULES[bool]),
    **dict.fromkeys(
        (
            "chat_template_hash", "data_hash", "loss_on", "template", "tokenizer_hash",
            "validation_hash",
        ),
        JSON_RULES[str],
    ),
    "base_labels": (_ARE_TEXTS, "a list of texts"),
    "columns": (_are_pairs, "an object of texts"),
    "dtype": (lambda value: value in _DTYPES, f"one of {', '.join(_DTYPES)}"),
    "seed": (lambda seed: type(seed) is int and 0 <= seed < 1 << 32, "in [0, 2**32)"),
}  # fmt: skip


def save_adapter(path: str | Path, adapter: Adapter) -> int:
    """Writes an adapter file atomically.

    A sparse leaf takes 4 bytes per position plus a value in the base's dtype: 6 bytes
    per entry with bfloat16.

    Args:
      path: file to write.
      adapter: what was trained.

    Returns:
      Bytes of the file.

    Raises:
      InputError: naming the leaf, if an array has NaN or infinity in it or a support
        is not ascending; or if the settings are not values of JSON.
    """
    path = Path(path)
    tensors = dict(_to_tensors(adapter))
    for name in sorted({*adapter.support, *adapter.values}):
        _require_support("`adapter`", name, adapter, "Take it from a tuner.")
    for name, array in tensors.items():
        _require_finite("`adapter`", name, array, "Load an earlier checkpoint.")
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, _to_metadata(adapter, tensors))
    return path.stat().st_size


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file that takes the place of another once it is whole."""
    temporary = path.with_name(f".{path.name}.part")
    yield temporary
    os.replace(temporary, path)


def load_adapter(path: str | Path, *, verify: bool = True) -> Adapter:
    """Opens an adapter, whose arrays stay in the file until they are used.

    The file is memory-mapped: pages are loaded when they are used, and writes to an
    array stay in memory. Never modify the file in place while an adapter is open;
    `save_adapter` replaces it.

    Args:
      path: adapter file, or the run directory that holds one.
      verify: whether to read every array once, for the checksum of the file, ascending
        supports and finite values. Without it only what the header says is checked:
        that the file is complete, the format, the settings, and shapes and dtypes. Pass
        False for a file that was verified before.

    Raises:
      InputError: if there is no such file, or if it is truncated, of another format,
        or not what was written; or if it holds supports that are not ascending
        positions, values that are not finite, or settings of a wrong type.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / ADAPTER).is_file():
            require_no_peft("adapter", path)
            raise InputError(
                "`adapter` must be an adapter file, or the folder of a run or of PEFT, "
                f"got `{path}`, which has neither `{ADAPTER}` nor `{PEFT_CONFIG}`. "
                "A run writes it at its end: resume one that was interrupted."
            )
        path = path / ADAPTER
    metadata, tensors = _read(path)
    words = _words(path, metadata[_KEY]) if _KEY in metadata else {}
    if "format" not in words:
        require_no_peft("adapter", path.parent)
        raise InputError(
            f"`{path}` must be an adapter of sparse_jax, got a safetensors file of "
            "something else. Pass what a run or `save_adapter` wrote; a whole model "
            "is the base of an adapter, passed as `model`."
        )
    if words["format"] not in (FORMAT, FORMAT_1):
        raise InputError(
            f"`{path}` must be an adapter of format {FORMAT!r}, got "
            f"{brief(words['format'])}{_writer(words)}. Write it with "
            "`save_adapter` of this version."
        )
    # Files of earlier versions have none.
    digest = words.pop("digest", None)
    if verify and digest is not None and digest != _digest(words, tensors):
        raise InputError(
            f"`{path}` must hold what was written to it, but its checksum is that of "
            "other content. Copy it again."
        )
    _require_words(path, words)
    adapter = _from_tensors(path, tensors, words)
    for name in sorted({*adapter.support, *adapter.values}):
        _require_support(f"`{path}`", name, adapter, "Copy it again.", verify)
    for name, array in tensors.items() if verify else ():
        if not name.endswith(_POSITIONS):
            _require_finite(f"`{path}`", name, array, "Train it again.")
    return adapter


def _writer(words: Mapping[str, object]) -> str:
    """Returns which version wrote a file, if the file says so."""
    found = words.get("version")
    return f" of sparse_jax {printable(found)[:20]}" if isinstance(found, str) else ""


def _to_tensors(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays by their names in the file."""
    found = {f"{name}{_POSITIONS}": array for name, array in adapter.support.items()}
    found |= {f"{name}{_VALUES}": array for name, array in adapter.values.items()}
    for name, array in adapter.dense.items():
        if name.startswith(_ADDED) or name.endswith((_POSITIONS, _VALUES)):
            raise InputError(
                f"`dense` must have no leaf that begins with {_ADDED!r} or ends with "
                f"{_POSITIONS!r} or {_VALUES!r}, got {name!r}: the file has another "
                "use for these. Rename the parameter."
            )
        found[name] = array
    for site, parts in adapter.added.items():
        found |= {f"{_ADDED}{site}/{part}": array for part, array in parts.items()}
    for name, array in found.items():
        # safetensors writes the memory of an array, whatever the strides say.
        yield name, np.asarray(array, order="C")


def _to_metadata(adapter: Adapter, tensors: Arrays) -> dict[str, str]:
    """Returns what is not an array, as one string.

    safetensors writes several in an order of its own, so that equal adapters would
    be unequal files.
    """
    names = (*_WORDS, "base_config", "base_leaves", "settings", "labels")
    method, word = adapter.method, adapter.word
    settings = None
    if method != Method():
        word, settings = word or word_of(method), method.to_settings()
    words = {
        "format": FORMAT,
        "method": word,
        "method_settings": settings,
        "version": version("sparse_jax"),
        **{name: getattr(adapter, name) for name in names},
    }
    try:
        # What a reader gets: lists for tuples.
        words = json.loads(json.dumps(words, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`settings` must be values of JSON to be saved, got one that is not: "
            f"{error}. Convert arrays and NumPy numbers to Python's."
        ) from error
    words["digest"] = _digest(words, tensors)
    return {_KEY: json.dumps(words, sort_keys=True)}


def adapter_digest(adapter: Adapter) -> str:
    """Returns the SHA-256 of the arrays of an adapter and what its method does."""
    return _digest(adapter.method.to_settings(), dict(_to_tensors(adapter)))


def _digest(words: Mapping[str, object], tensors: Arrays) -> str:
    """Returns the SHA-256 of all that an adapter says and holds."""
    found = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        found.update(repr((name, str(array.dtype), array.shape)).encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], Arrays]:
    """Returns the metadata and the tensors of a safetensors file."""
    if not path.is_file():
        raise InputError(
            "`adapter` must be an adapter file, or the folder of a run or of PEFT, got "
            f"`{path}`, which does not exist. Check the spelling."
        )
    try:
        # Checks that the header is one, and that the arrays fill the file.
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        data = np.memmap(path, mode="c").view(np.ndarray)[8 + size :]
        return metadata, {name: _mapped(data, **header[name]) for name in header}
    # A damaged file may raise anything at all.
    except Exception as error:
        require_no_peft("adapter", path.parent)
        raise InputError(
            f"`{path}` must be a complete safetensors file: {reason_of(error)}. "
            "Copy it again."
        ) from error


def _mapped(
    data: np.ndarray, dtype: str, shape: Sequence[int], data_offsets: Sequence[int]
) -> np.ndarray:
    """Returns one array of a file, from what the header says of it."""
    begin, end = data_offsets
    return data[begin:end].view(_CODES[dtype]).reshape(shape)


def _words(path: Path, text: str) -> dict[str, Any]:
    """Returns the metadata that was written as one string."""
    try:
        words = json.loads(text)
        reason = f"got {type(words).__name__}"
    except (ValueError, RecursionError) as error:
        words, reason = None, f"which it is not: {reason_of(error)}"
    if not isinstance(words, dict):
        raise InputError(
            f"`{_KEY}` in the metadata of `{path}` must be a JSON object, {reason}. "
            "Copy the file again."
        )
    return words


def _require_words(path: Path, words: dict[str, Any]) -> None:
    """Raises unless what is not an array is there, and of the right type."""
    words.setdefault("base_config", {})
    words.setdefault("base_leaves", {})
    words.setdefault("license", "")
    if words["format"] == FORMAT_1:
        words.setdefault("method_settings", None)
    for name, (kind, rule) in _TYPES.items():
        if name not in words:
            raise InputError(
                f"`{path}` must name its method, base and labels, but `{name}` is "
                "missing. Copy it again."
            )
        if not isinstance(words[name], kind):
            raise _wrong(path, name, rule, words[name])
    labels = words["labels"]
    are_texts = all(isinstance(label, str) for label in labels)
    if not are_texts or len({*labels}) < len(labels):
        raise _wrong(path, "labels", "different texts", labels)
    for name, (keeps, rule) in _RULES.items():
        value = words["settings"].get(name)
        if value is not None and not keeps(value):
            raise _wrong(path, name, rule, value)


def _wrong(path: Path, name: str, rule: str, value: object) -> InputError:
    """Returns the error of a word or a setting that breaks a rule."""
    return InputError(
        f"`{name}` in `{path}` must be {rule}, got {brief(value)}. Copy it again."
    )


def _from_tensors(path: Path, tensors: Arrays, words: Mapping[str, Any]) -> Adapter:
    """Sorts tensors by what their names say."""
    support, values, dense, added = {}, {}, {}, {}
    for name, array in tensors.items():
        if name.startswith(_ADDED):
            site, _, part = name.removeprefix(_ADDED).rpartition("/")
            added.setdefault(site, {})[part] = array
        elif name.endswith(_POSITIONS):
            support[name.removesuffix(_POSITIONS)] = array
        elif name.endswith(_VALUES):
            values[name.removesuffix(_VALUES)] = array
        else:
            dense[name] = array
    return Adapter(
        support, values, dense, added,
        method=_method(path, words, [*dense], bool(added)),
        word=words["method"],
        settings=words["settings"],
        labels=tuple(words["labels"]),
        base_config=words["base_config"],
        base_leaves=words["base_leaves"],
        **{name: words[name] for name in _WORDS},
    )  # fmt: skip


def _method(
    path: Path, words: Mapping[str, Any], dense: Sequence[str], has_added: bool
) -> Method:
    """Returns the method of a file, which reads its own settings."""
    word, settings, place = words["method"], words["method_settings"], f"`{path}`"
    if words["format"] == FORMAT_1:
        # A decoder that writes text has no head of its own.
        about = {"has_added": has_added, "has_head": words["task"] != "causal"}
        args = (word, words["settings"], dense)
        return method_of_format_1(*args, **about, place=place)
    if settings is None:
        require_no_settings(word, has_added)
        return Method()
    return entry_of(word, place).kind.from_settings(settings, place)


def _require_support(
    place: str, name: str, adapter: Adapter, remedy: str, verify: bool = True
) -> None:
    """Raises unless a leaf has ascending positions and as many values.

    Without `verify` the positions themselves are not read.
    """
    require_pair(place, name, adapter, remedy)
    support = adapter.support[name]
    is_sorted = support.dtype == np.int32 and support.ndim in (1, 2)
    if verify and is_sorted:
        is_sorted = (support[..., :1] >= 0).all() and (np.diff(support) > 0).all()
    if not is_sorted:
        raise InputError(
            f"`{name}{_POSITIONS}` in {place} must hold ascending int32 positions. "
            f"{remedy}"
        )


def _require_finite(place: str, name: str, array: np.ndarray, remedy: str) -> None:
    """Raises if an array of numbers has NaN or infinity in it."""
    if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
        return
    if not is_finite(array):
        bad = array.size - int(np.isfinite(array).sum())
        raise InputError(
            f"`{name}` in {place} must hold finite numbers, got {bad} of {array.size} "
            f"that are not. {remedy}"
        )
