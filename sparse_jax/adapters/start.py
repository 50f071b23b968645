"""How the arrays that a method adds start."""

import jax
import jax.numpy as jnp

from sparse_jax.scores import leaf_key

__all__ = ["uniform"]


def uniform(key: jax.Array, name: str, shape: tuple[int, int, int]) -> jax.Array:
    """Draws kernels (L, in, out) uniform in +-1 / sqrt(in), as PyTorch's and PEFT's.

    The draw depends on the key and the name, and not on other arrays.

    Example:
      >>> bool(jnp.abs(uniform(jax.random.key(0), "mlp/up", (2, 4, 3))).max() <= 0.5)
      True
    """
    draw = jax.random.uniform(leaf_key(key, name), shape, jnp.float32, -1.0, 1.0)
    return draw / jnp.sqrt(jnp.float32(shape[1]))
