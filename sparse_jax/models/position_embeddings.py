"""Positions: rotary embeddings in halves or in pairs, and ALiBi.

References:
  Press, Smith and Lewis, 2022. https://arxiv.org/abs/2108.12409
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.models.config import LayerKind, RopeScaling

__all__ = [
    "Turn",
    "alibi",
    "angles",
    "base_frequencies",
    "rotate",
    "rotate_pairs",
    "slopes",
    "turn_of",
]


class Turn(NamedTuple):
    """The angles of every token."""

    cos: jax.Array  # shape=(B, T, 1, K / 2), float32
    sin: jax.Array  # shape=(B, T, 1, K / 2), float32


def turn_of(kind: LayerKind, head_size: int, positions: jax.Array) -> Turn:
    """Returns the angles of tokens at int32 positions `[B, T]`, zero without a base."""
    if kind.rope_theta is None:
        return angles(positions, np.zeros(head_size // 2, np.float32))
    frequencies = base_frequencies(head_size, kind.rope_theta)
    if kind.rope_scaling is not None:
        frequencies = _stretched(frequencies, kind.rope_scaling)
    return angles(positions, frequencies)


def angles(positions: jax.Array, frequencies: np.ndarray) -> Turn:
    """Returns position times frequency, of int32 `[B, T]` and float32 `[K / 2]`."""
    pace = jnp.asarray(frequencies, jnp.float32).reshape(1, 1, 1, -1)
    turned = positions[:, :, None, None].astype(jnp.float32) * pace
    return Turn(jnp.cos(turned), jnp.sin(turned))


def base_frequencies(size: int, theta: float) -> np.ndarray:
    """Returns the angles per position, shape=(size / 2,), in float32 as PyTorch does.

    Example:
      >>> base_frequencies(4, 10000.0).tolist()
      [1.0, 0.009999999776482582]
    """
    exponents = np.arange(0, size, 2, dtype=np.float32) / size
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def rotate(x: jax.Array, turn: Turn) -> jax.Array:
    """Turns the leading entries of heads `[B, T, H, K]`, in float32.

    Of twice as many entries as `turn` has angles, the first half is turned against the
    second.

    Example:
      >>> quarter = Turn(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
      >>> rotate(jnp.array([[[[1.0, 2.0, 3.0]]]]), quarter)[0, 0, 0]
      Array([-2.,  1.,  3.], dtype=float32)
    """
    size = 2 * turn.cos.shape[-1]
    a, b = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = [a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin]
    front = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    if size == x.shape[-1]:
        return front
    return jnp.concatenate([front, x[..., size:]], axis=-1)


def _stretched(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Returns the frequencies for longer texts."""
    slow = frequencies / scaling.factor
    if scaling.low is None or scaling.high is None or not scaling.original_positions:
        return slow
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    share = (turns - scaling.low) / (scaling.high - scaling.low)
    share = np.clip(share, 0.0, 1.0)
    return (share * frequencies + (1 - share) * slow).astype(np.float32)


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
