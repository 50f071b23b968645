"""Rotary positions: queries and keys turned by angles that grow with the position."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.models.decoder_config import DecoderConfig, RopeScaling

__all__ = ["Turn", "angles", "base_frequencies", "rotate", "turn_of"]


class Turn(NamedTuple):
    """The angles of every token."""

    cos: jax.Array  # shape=(B, T, 1, K / 2), float32
    sin: jax.Array  # shape=(B, T, 1, K / 2), float32


def turn_of(config: DecoderConfig, positions: jax.Array) -> Turn:
    """Returns the angles of tokens at int32 positions `[B, T]`."""
    frequencies = base_frequencies(config.head_size, config.rope_theta)
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
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
    """Turns heads `[B, T, H, K]`, the first half of K against the second, in float32.

    Example:
      >>> quarter = Turn(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
      >>> rotate(jnp.array([[[[1.0, 2.0]]]]), quarter)[0, 0, 0]
      Array([-2.,  1.], dtype=float32)
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _stretched(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Returns the frequencies for longer texts."""
    slow = frequencies / scaling.factor
    if scaling.low is None or scaling.high is None or not scaling.original_positions:
        return slow
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    share = (turns - scaling.low) / (scaling.high - scaling.low)
    share = np.clip(share, 0.0, 1.0)
    return (share * frequencies + (1 - share) * slow).astype(np.float32)
