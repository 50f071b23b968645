"""Prompts of unequal length in a few shapes, and the model that reads them.

A program is compiled for every shape. Rows are padded to a fixed number and columns to
a power of two, on the left: then the last column is the last token of every prompt.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_jax.models.attachment import Arrays, Attachment
from sparse_jax.models.causal_lm import Cache
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.modules import Inputs

__all__ = ["Prompts", "AdaptedModel", "bucket", "padded_batches"]

# Fewer columns cost as much as these.
_LEAST = 16


class Prompts(NamedTuple):
    """Prompts that are read at once; rows without a token are padding."""

    input_ids: ArrayLike  # shape=(B, T), int32
    attention_mask: ArrayLike  # shape=(B, T), int32: 1 at tokens
    numbers: ArrayLike  # shape=(B,), int32: of the rows among all prompts


def bucket(length: int, most: int | None = None) -> int:
    """Returns the columns for rows of this length: a power of two, or at most `most`.

    Example:
      >>> [bucket(length, 1000) for length in (1, 16, 17, 600)]
      [16, 16, 32, 1000]
    """
    columns = max(_LEAST, 1 << (length - 1).bit_length())
    return columns if most is None else min(columns, most)


def padded_batches(
    prompts: Sequence[np.ndarray],
    *,
    batch_size: int,
    most: int,
    pad_id: int,
    columns: int | None = None,
) -> Iterator[Prompts]:
    """Yields all prompts, those of like length together.

    Args:
      prompts: arrays of token ids, none of them empty.
      batch_size: rows of a batch.
      most: columns beyond which no batch is padded; no prompt is longer.
      pad_id: any token.
      columns: of every batch; None takes those of `bucket`.

    Example:
      >>> prompts = [np.array([5, 6, 7]), np.array([8])]
      >>> batch, = padded_batches(prompts, batch_size=3, most=4, pad_id=0)
      >>> batch.input_ids.tolist(), batch.numbers.tolist()
      ([[0, 0, 0, 8], [0, 5, 6, 7], [0, 0, 0, 0]], [1, 0, 2])
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = columns or bucket(len(prompts[chosen[-1]]), most)
        ids = np.full((batch_size, width), pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, number in enumerate(chosen):
            size = len(prompts[number])
            ids[row, width - size :] = prompts[number]
            mask[row, width - size :] = 1
        spare = range(len(prompts), len(prompts) + batch_size - len(chosen))
        yield Prompts(ids, mask, np.array([*chosen, *spare], np.int32))


class AdaptedModel(NamedTuple):
    """A decoder with its parameters and what is attached to it."""

    model: Model
    params: Params
    attachment: Attachment
    # Parameters of each layer, where they are not read from the stack.
    layers: tuple[Arrays, ...] | None = None

    def start(self, prompts: Prompts, num_more: int) -> tuple[jax.Array, Cache]:
        """Reads prompts.

        Args:
          prompts: padded on the left.
          num_more: tokens that will be read after them.

        Returns:
          Float32 logits of the first new token `[B, V]`, and the cache.
        """
        rows, columns = jnp.shape(prompts.input_ids)
        cache = self.model.cache(self.params, rows, columns + num_more)
        batch = _batch(prompts.input_ids, prompts.attention_mask)
        hidden, cache = self.model.read(
            self.params, batch, cache, attachment=self.attachment
        )
        cache = cache if self.layers is None else cache.apart()
        return self.model.logits(self.params, hidden[:, -1]), cache

    def read(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads one token more in each row, int32 `[B]`; returns as `start` does."""
        tokens = tokens[:, None]
        hidden, cache = self.model.extend(
            self.params,
            _batch(tokens, jnp.ones_like(tokens)),
            cache,
            attachment=self.attachment,
            parts=self.layers,
        )
        return self.model.logits(self.params, hidden[:, -1]), cache


def _batch(ids: ArrayLike, mask: ArrayLike) -> Inputs:
    """Returns the arrays that a model reads."""
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}
