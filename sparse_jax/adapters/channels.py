"""Vectors with one entry for each channel of a site."""

import jax

__all__ = ["channels"]


def channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a vector [D] in the dtype and the rank of x, `[..., D]`.

    Example:
      >>> import jax.numpy as jnp
      >>> channels(jnp.ones(4), jnp.ones((2, 3, 4), jnp.bfloat16)).shape
      (1, 1, 4)
    """
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
