"""ALiBi: scores that fall with the distance, at another pace for every head.

References:
  Press, Smith and Lewis, 2022. https://arxiv.org/abs/2108.12409
"""

import jax
import jax.numpy as jnp

__all__ = ["alibi", "slopes"]


def alibi(num_heads: int, positions: jax.Array) -> jax.Array:
    """Returns what is added to the scores of keys at int32 positions `[B, S]`.

        bias[b, h, 0, s] = slope[h] * positions[b, s]

    A softmax does not see what is added to all of its inputs, so this is the same as
    `slope * (positions[s] - positions[t])` for the query at t. The shape is
    `[B, H, 1, S]`, the dtype float32.
    """
    pace = jnp.asarray(slopes(num_heads), jnp.float32).reshape(1, -1, 1, 1)
    return pace * positions[:, None, None, :].astype(jnp.float32)


def slopes(num_heads: int) -> list[float]:
    """Returns one slope for each head: `2^(-8 h / H)` for h = 1, ..., H.

    If H is no power of two, these are the slopes of the power below, and then every
    other one of the power above.

    Example:
      >>> slopes(4)
      [0.25, 0.0625, 0.015625, 0.00390625]
      >>> slopes(3)
      [0.0625, 0.00390625, 0.25]
    """
    power = 1 << (num_heads.bit_length() - 1)
    full = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-4 * h / power) for h in range(1, 2 * power, 2)]
    return full + between[: num_heads - power]
