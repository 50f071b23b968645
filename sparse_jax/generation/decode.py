"""The loop that writes one token after another in every row."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.generation.ends import ends_here
from sparse_jax.generation.prompts import Prompts
from sparse_jax.generation.reader import Reader
from sparse_jax.models.causal_lm import Cache

__all__ = ["decode"]

# (logits [B, V], one key for each row [B]) -> tokens [B], int32
Choose = Callable[[jax.Array, jax.Array], jax.Array]


class _Rows(NamedTuple):
    """What has been written so far; S new tokens at most."""

    tokens: jax.Array  # shape=(B, S), int32
    last: jax.Array  # shape=(B,), int32: the token that has not been read yet
    is_done: jax.Array  # shape=(B,), bool
    count: jax.Array  # shape=(), int32: new tokens
    cache: Cache


def decode(
    reader: Reader,
    prompts: Prompts,
    keys: jax.Array,
    stop: jax.Array,
    max_new_tokens: int,
    choose: Choose,
) -> jax.Array:
    """Writes after every prompt until all rows have met a stop token.

    Args:
      reader: the model.
      prompts: padded on the left.
      keys: one for each row, `[B]`; what a row draws depends on nothing else.
      stop: what ends a text, of `end_table`.
      max_new_tokens: most tokens to write.
      choose: returns the next tokens.

    Returns:
      New tokens, int32 `[B, max_new_tokens]`, without meaning after an end.
    """

    def write(rows: _Rows, logits: jax.Array, cache: Cache) -> _Rows:
        here = jax.vmap(jax.random.fold_in, (0, None))(keys, rows.count)
        token = choose(logits, here)
        tokens = rows.tokens.at[:, rows.count].set(token)
        return _Rows(
            tokens=tokens,
            last=token,
            is_done=rows.is_done | ends_here(tokens, rows.count, stop),
            count=rows.count + 1,
            cache=cache,
        )

    def is_open(rows: _Rows) -> jax.Array:
        return (rows.count < max_new_tokens) & ~jnp.all(rows.is_done)

    logits, cache = reader.start(prompts, max_new_tokens - 1)
    num_rows = logits.shape[0]
    empty = _Rows(
        tokens=jnp.zeros((num_rows, max_new_tokens), jnp.int32),
        last=jnp.zeros(num_rows, jnp.int32),
        is_done=~jnp.any(jnp.asarray(prompts.attention_mask, bool), axis=1),
        count=jnp.zeros([], jnp.int32),
        cache=cache,
    )
    step = lambda rows: write(rows, *reader.read(rows.last, rows.cache))
    return jax.lax.while_loop(is_open, step, write(empty, logits, cache)).tokens
