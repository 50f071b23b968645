"""Rotary positions as GPT-J has them: neighbouring entries turned as a pair."""

import jax
import jax.numpy as jnp

from sparse_jax.models.rope import Turn

__all__ = ["rotate_pairs"]


def rotate_pairs(x: jax.Array, turn: Turn) -> jax.Array:
    """Turns the leading entries of heads `[B, T, H, K]`, in float32.

    Entry 2i is turned against entry 2i + 1, for as many pairs as `turn` has angles.

    Example:
      >>> quarter = Turn(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
      >>> rotate_pairs(jnp.array([[[[1.0, 2.0, 3.0]]]]), quarter)[0, 0, 0]
      Array([-2.,  1.,  3.], dtype=float32)
    """
    size = 2 * turn.cos.shape[-1]
    pairs = x[..., :size].astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = [a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin]
    front = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], size)
    return jnp.concatenate([front.astype(x.dtype), x[..., size:]], axis=-1)
