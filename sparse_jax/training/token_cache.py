"""Tokens of texts, kept in a folder of the user, so that a second run has them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_jax.adapter.file import replacing
from sparse_jax.data.batches import Encoded, TokenSequences
from sparse_jax.data.examples import Examples
from sparse_jax.data.sources import file_hash
from sparse_jax.errors import reason_of
from sparse_jax.params.fields import Json
from sparse_jax.training.compilation_cache import cache_folder

__all__ = ["Tokens", "encoded_of", "tokenizer_files", "tokens_of"]

_FORMAT = 4
_MOST = 10 << 30  # bytes of the folder; what was used least recently makes way
# What a tokenizer is read from.
_FILES = ("*token*", "vocab*", "merges*", "*.model", "chat_template*", "config.json")

_log = logging.getLogger(__name__)


Kept = TypeVar("Kept")
Arrays = dict[str, np.ndarray]


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
    return _cached(key, make, _tokens_to_arrays, _tokens_from_arrays)


def encoded_of(
    texts: Mapping[str, Examples],
    key: list[Json] | None,
    make: Callable[[], dict[str, Encoded]],
) -> dict[str, Encoded]:
    """Returns examples as token ids, from the cache or else made and kept.

    Args:
      texts: the examples, of which the texts are part of the key.
      key: what else the ids depend on; None keeps none.
      make: tokenizes the texts.
    """
    if key is not None:
        key = [*key, [[name, _digest_of_texts(one)] for name, one in texts.items()]]

    def read(arrays: Arrays, said: dict[str, Any]) -> dict[str, Encoded]:
        found = {}
        for name, about in said.items():
            starts = np.cumsum(arrays[f"{name}.lengths"])[:-1]
            ids = np.split(arrays[f"{name}.ids"], starts)
            types = arrays.get(f"{name}.types")
            found[name] = Encoded(
                ids, None if types is None else np.split(types, starts),
                texts[name].labels, **about, weights=texts[name].weights,
            )  # fmt: skip
        return found

    return _cached(key, make, _encoded_to_arrays, read)


def _digest_of_texts(examples: Examples) -> str:
    """Returns the SHA-256 of the texts of examples."""
    found = hashlib.sha256()
    for texts in (examples.text_a, examples.text_b or ()):
        found.update(len(texts).to_bytes(8, "little"))
        for text in texts:
            # Half of a character is refused before.
            content = text.encode(errors="surrogatepass")
            found.update(len(content).to_bytes(8, "little"))
            found.update(content)
    return found.hexdigest()


def _cached(
    key: list[Json] | None,
    make: Callable[[], Kept],
    to_arrays: Callable[[Kept], tuple[Arrays, dict[str, Any]]],
    from_arrays: Callable[[Arrays, dict[str, Any]], Kept],
) -> Kept:
    """Returns what is in the cache under a key, or else makes and keeps it."""
    folder = None if key is None else cache_folder()
    if folder is None:
        return make()
    libraries = [version(name) for name in ("sparse_jax", "tokenizers", "transformers")]
    said = json.dumps([_FORMAT, *libraries, key], sort_keys=True).encode()
    path = folder / "tokens" / f"{hashlib.sha256(said).hexdigest()}.safetensors"
    if (found := _read(path)) is not None:
        _log.info("tokens are those of an earlier run. Not with `no_cache=True`")
        return from_arrays(*found)
    tokens = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays, about = to_arrays(tokens)
        with replacing(path) as temporary:
            save_file(arrays, temporary, {"about": json.dumps(about)})
        _make_room(path.parent)
    # A full or read-only disk is no reason to stop.
    except (OSError, SafetensorError) as error:
        _log.warning("tokens are not kept in %s: %s", path.parent, reason_of(error))
    return tokens


def _encoded_to_arrays(
    splits: dict[str, Encoded],
) -> tuple[Arrays, dict[str, Any]]:
    """Returns what a file holds of examples: not their labels."""
    arrays, about = {}, {}
    for name, part in splits.items():
        arrays[f"{name}.ids"] = np.concatenate(part.input_ids)
        arrays[f"{name}.lengths"] = np.array([len(ids) for ids in part.input_ids])
        if part.token_type_ids is not None:
            arrays[f"{name}.types"] = np.concatenate(part.token_type_ids)
        about[name] = {
            "max_length": part.max_length, "pad_id": part.pad_id,
            "num_truncated": part.num_truncated,
        }  # fmt: skip
    return arrays, about


def _tokens_to_arrays(tokens: Tokens) -> tuple[Arrays, dict[str, Any]]:
    """Returns what a file holds of the tokens of all splits."""
    arrays, about = {}, {}
    for name, part in tokens.splits.items():
        arrays[f"{name}.ids"] = np.concatenate(part.input_ids)
        arrays[f"{name}.targets"] = np.concatenate(part.is_target)
        arrays[f"{name}.lengths"] = np.array([len(ids) for ids in part.input_ids])
        if part.weights is not None:
            arrays[f"{name}.weights"] = part.weights
        about[name] = {
            "max_length": part.max_length, "pad_id": part.pad_id,
            "num_truncated": part.num_truncated, "num_dropped": part.num_dropped,
            "end_ids": part.end_ids,
        }  # fmt: skip
    return arrays, {"splits": about, "has_chats": tokens.has_chats}


def _read(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Returns the content of a file; None if there is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            said, arrays = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        path.touch()
    # A damaged one is written again.
    except (OSError, SafetensorError):
        return None
    return arrays, json.loads(said["about"])


def _tokens_from_arrays(arrays: Arrays, said: dict[str, Any]) -> Tokens:
    """Returns the tokens that a file holds."""
    splits = {}
    for name, about in said["splits"].items():
        starts = np.cumsum(arrays[f"{name}.lengths"])[:-1]
        ids, marks = (
            np.split(arrays[f"{name}.{kind}"], starts) for kind in ("ids", "targets")
        )
        about["end_ids"] = tuple(about["end_ids"])
        weights = arrays.get(f"{name}.weights")
        splits[name] = TokenSequences(ids, marks, **about, weights=weights)
    return Tokens(splits, said["has_chats"])


def _make_room(folder: Path) -> None:
    """Removes what was used least recently while the folder is too large."""
    files = [(path.stat(), path) for path in folder.glob("*.safetensors")]
    total = sum(about.st_size for about, _ in files)
    for about, path in sorted(files, key=lambda pair: pair[0].st_mtime)[:-1]:
        if total > _MOST:
            path.unlink(missing_ok=True)
            total -= about.st_size
