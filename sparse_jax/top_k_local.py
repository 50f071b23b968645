"""Exact selection of the k largest entries of an array that is cut over a mesh.

The search for the threshold is that of `top_k`, with one scalar all-reduce a pass, and
equal magnitudes go to the lower position in the whole array: the support is that of the
uncut array, bit for bit. No entry leaves its device.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.local_support import Cut
from sparse_jax.top_k import bits_of, count_from, key_of, positions_of, search

__all__ = ["top_k_tables"]


def top_k_tables(
    x: jax.Array, k: int, cut: Cut, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the positions of the k entries of largest magnitude, shard by shard.

    Args:
      x: array with at most 2**31 - 1 entries, cut as `cut` says.
      k: entries of the whole array, in [1, x.size].
      cut: how `x` is cut.
      capacity: slots of every shard.

    Returns:
      Tables as in a `LocalSupport`, shape=(S, capacity), int32, and how many entries
      each shard has, shape=(S,), int32: where that is more than `capacity`, the table
      lacks the rest.
    """

    def select(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = lambda count: lax.psum(count, cut.axes)
        size = x.size * cut.shards
        found = search(lambda key: total(count_from(x, key)), size, k)
        keys = key_of(x)
        tied = (keys >= found.low) & (keys < found.high)
        place = _places(x.shape, cut)
        end = _end_of_ties(
            lambda end: total(jnp.sum(tied & (place < end), dtype=jnp.int32)),
            size,
            k - found.above,
            found.found,
        )
        chosen = (keys >= found.high) | (tied & (place < end))
        count = jnp.sum(chosen, dtype=jnp.int32)
        words = bits_of(chosen.reshape(-1))
        slots = lax.iota(jnp.int32, capacity)
        positions = jnp.where(slots < count, positions_of(words, capacity), x.size)
        # Unused slots are distinct.
        positions += jnp.where(slots < count, 0, slots)
        return positions[None], count[None]

    return jax.shard_map(
        select,
        in_specs=cut.spec,
        out_specs=(jax.P(cut.axes, None), jax.P(cut.axes)),
    )(x)


def _places(shape: Sequence[int], cut: Cut) -> jax.Array:
    """Returns the row-major positions of a shard's entries in the whole array."""
    strides = [
        math.prod(n * parts for n, parts in zip(shape[i:], cut.counts[i:], strict=True))
        for i in range(1, len(shape) + 1)
    ]
    place = jnp.zeros(shape, jnp.int32)
    for i, (names, stride) in enumerate(zip(cut.names, strides, strict=True)):
        start = lax.axis_index(names) * shape[i] if names else 0
        along = lax.broadcasted_iota(jnp.int32, shape, i)
        place += (start + along) * stride
    return place


def _end_of_ties(count, size: int, wanted: jax.Array, is_all: jax.Array) -> jax.Array:
    """Returns the position before which `wanted` of the tied entries lie."""

    def halve(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        enough = count(middle) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    high = jnp.int32(size)
    low = jnp.where(is_all, high - 1, jnp.int32(0))
    return lax.while_loop(lambda ends: ends[1] - ends[0] > 1, halve, (low, high))[1]
