"""Tokens of texts, kept in a folder of the user, so that a second run has them."""

import hashlib
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_jax.adapter.file import replacing
from sparse_jax.data.batches import TokenSequences
from sparse_jax.data.sources import file_hash
from sparse_jax.errors import reason_of
from sparse_jax.params.fields import Json
from sparse_jax.training.compilation_cache import cache_folder

__all__ = ["Tokens", "tokenizer_files", "tokens_of"]

_FORMAT = 1
_MOST = 10 << 30  # bytes of the folder; what was used least recently makes way
# What a tokenizer is read from.
_FILES = ("*token*", "vocab*", "merges*", "*.model", "chat_template*", "config.json")

_log = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """The tokens of all splits."""

    splits: dict[str, TokenSequences]
    has_chats: bool  # whether a chat template wrote any of them


def tokenizer_files(folder: Path) -> list[Json]:
    """Returns the names and digests of the files that a tokenizer is read from."""
    found = {path for pattern in _FILES for path in folder.glob(pattern)}
    return [[path.name, file_hash(path)] for path in sorted(found) if path.is_file()]


def tokens_of(key: list[Json] | None, make: Callable[[], Tokens]) -> Tokens:
    """Returns tokens from the cache, or else makes and keeps them.

    Args:
      key: all that they depend on, beside the versions of libraries; None keeps none.
      make: reads and tokenizes the data.
    """
    folder = None if key is None else cache_folder()
    if folder is None:
        return make()
    libraries = [version(name) for name in ("sparse_jax", "tokenizers", "transformers")]
    said = json.dumps([_FORMAT, *libraries, key], sort_keys=True).encode()
    path = folder / "tokens" / f"{hashlib.sha256(said).hexdigest()}.safetensors"
    if (found := _read(path)) is not None:
        _log.info("tokens are those of an earlier run (not with --no-cache)")
        return found
    tokens = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, tokens)
        _make_room(path.parent)
    # A full or read-only disk is no reason to stop.
    except (OSError, SafetensorError) as error:
        _log.warning("tokens are not kept in %s: %s", path.parent, reason_of(error))
    return tokens


def _write(path: Path, tokens: Tokens) -> None:
    """Writes the tokens of all splits, whole or not at all."""
    arrays, about = {}, {}
    for name, part in tokens.splits.items():
        arrays[f"{name}.ids"] = np.concatenate(part.input_ids)
        arrays[f"{name}.targets"] = np.concatenate(part.is_target)
        arrays[f"{name}.lengths"] = np.array([len(ids) for ids in part.input_ids])
        if part.weights is not None:
            arrays[f"{name}.weights"] = part.weights
        about[name] = {
            "max_length": part.max_length, "pad_id": part.pad_id,
            "num_cut": part.num_cut, "num_dropped": part.num_dropped,
            "end_ids": part.end_ids,
        }  # fmt: skip
    said = {"splits": json.dumps(about), "has_chats": json.dumps(tokens.has_chats)}
    with replacing(path) as temporary:
        save_file(arrays, temporary, said)


def _read(path: Path) -> Tokens | None:
    """Returns the tokens of a file; None if there are none."""
    try:
        with safe_open(path, framework="numpy") as file:
            said, arrays = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        path.touch()
    # A damaged one is written again.
    except (OSError, SafetensorError):
        return None
    splits = {}
    for name, about in json.loads(said["splits"]).items():
        starts = np.cumsum(arrays[f"{name}.lengths"])[:-1]
        ids, marks = (
            np.split(arrays[f"{name}.{kind}"], starts) for kind in ("ids", "targets")
        )
        about["end_ids"] = tuple(about["end_ids"])
        weights = arrays.get(f"{name}.weights")
        splits[name] = TokenSequences(ids, marks, **about, weights=weights)
    return Tokens(splits, json.loads(said["has_chats"]))


def _make_room(folder: Path) -> None:
    """Removes what was used least recently while the folder is too large."""
    files = [(path.stat(), path) for path in folder.glob("*.safetensors")]
    total = sum(about.st_size for about, _ in files)
    for about, path in sorted(files, key=lambda pair: pair[0].st_mtime)[:-1]:
        if total > _MOST:
            path.unlink(missing_ok=True)
            total -= about.st_size
