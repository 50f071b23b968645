"""What ends a text: a token, or several in a row."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError, brief, reason_of

__all__ = ["before_end", "end_table", "ends_here", "ends_of_model", "require_ends"]

End = int | Sequence[int]

# In place of a token: any token, or none.
_ANY = -1
_LARGEST = 2**31 - 1  # ids are int32


def end_table(ends: Sequence[End]) -> np.ndarray:
    """Returns ends as an array, int32 `[num_ends, tokens]`, last tokens at the right.

    Raises:
      InputError: if an end is neither a token nor several.

    Example:
      >>> end_table([5, (1, 2)])
      array([[-1,  5],
             [ 1,  2]], dtype=int32)
    """
    rows = [np.atleast_1d(np.asarray(end)) for end in ends]
    for end, row in zip(ends, rows, strict=True):
        is_one = row.ndim == 1 and row.size and row.dtype.kind in "iu"
        if not is_one or not 0 <= min(row) <= max(row) <= _LARGEST:
            raise InputError(
                f"`stop` must be ids of tokens, or several in a row, got {brief(end)}."
            )
    width = max(map(len, rows), default=1)
    table = np.full((len(rows), width), _ANY, np.int32)
    for place, row in zip(table, rows, strict=True):
        place[width - len(row) :] = row
    return table


def ends_here(tokens: jax.Array, last: jax.Array, table: jax.Array) -> jax.Array:
    """Says which texts end with an end.

    Args:
      tokens: int32 `[..., S]`.
      last: number of the last token that is written, int32.
      table: of `end_table`.

    Returns:
      bool `[...]`.

    Example:
      >>> tokens = jnp.array([[1, 2, 0], [2, 1, 0]])
      >>> ends_here(tokens, jnp.array(1), jnp.asarray(end_table([(1, 2)])))
      Array([ True, False], dtype=bool)
    """
    places = last - table.shape[1] + 1 + jnp.arange(table.shape[1])
    found = jnp.take(tokens, jnp.maximum(places, 0), axis=-1)
    found = jnp.where(_like(places, found) >= 0, found, _ANY - 1)[..., None, :]
    table = _like(table, found)
    return jnp.any(jnp.all((found == table) | (table == _ANY), axis=-1), axis=-1)


def _like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Returns an array with as many axes as another, new ones first."""
    return jnp.expand_dims(array, tuple(range(other.ndim - array.ndim)))


def before_end(tokens: np.ndarray, ends: Sequence[End]) -> np.ndarray:
    """Returns the tokens before the first end.

    Example:
      >>> before_end(np.array([3, 1, 1, 2, 5]), [5, (1, 2)])
      array([3, 1])
    """
    found = [(len(tokens), len(tokens))]
    for end in ends:
        row = np.atleast_1d(np.asarray(end))
        if len(row) <= len(tokens):
            windows = np.lib.stride_tricks.sliding_window_view(tokens, len(row))
            starts = np.flatnonzero(np.all(windows == row, axis=1))[:1]
            found += [(start + len(row), start) for start in starts.tolist()]
    return tokens[: min(found)[1]]


def ends_of_model(folder: Path, eos_ids: Sequence[object], vocab_size: int) -> set[int]:
    """Returns the tokens that end a text of a model, as transformers takes them.

    Those of `generation_config.json` if there is one, otherwise those of `config.json`.
    A token that the model lacks ends nothing.

    Args:
      folder: of the model.
      eos_ids: of its `config.json`.
      vocab_size: tokens that the model has.

    Raises:
      InputError: if the file is no JSON object, or has something else there.
    """
    path, found = folder / "config.json", list(eos_ids)
    if (folder / "generation_config.json").is_file():
        path = folder / "generation_config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, RecursionError, AttributeError) as error:
            raise InputError(
                f"`{path}` must be a JSON object: {reason_of(error)}. Copy it again, "
                "or remove it."
            ) from error
    ends = require_ends(found, f"`eos_token_id` in `{path}`")
    return {end for end in ends if 0 <= end < vocab_size}


def require_ends(value: object, name: str) -> list[int]:
    """Returns tokens as a list, of one, several or none.

    Raises:
      InputError: if they are not whole numbers.
    """
    ends = value if isinstance(value, list) else [value] * (value is not None)
    # bool is an int in Python.
    whole = [end for end in ends if type(end) is int]
    if len(whole) < len(ends):
        raise InputError(
            f"{name} must be the id of a token, or a list of ids, got {brief(value)}."
        )
    return whole
