"""Dropout with an explicit key; no key, no dropout."""

import jax
import jax.numpy as jnp

__all__ = ["dropout", "split_key"]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of the entries and scales the others by 1/(1 - rate).

    Without a key the array passes unchanged.

    Example:
      >>> dropout(jnp.ones(2), 0.5, None)
      Array([1., 1.], dtype=float32)
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """Splits a key into `num` keys, or no key into `num` times no key.

    Example:
      >>> split_key(None, 2)
      [None, None]
    """
    return [None] * num if key is None else list(jax.random.split(key, num))
