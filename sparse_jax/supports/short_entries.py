"""The layout of single entries whose positions take two bytes.

A position is the number of a chunk of 65,536 entries, and 16 bits within it. Positions
ascend, so that the chunks need not be kept: where each of them ends is enough.

    support = [ends % 2**16, ends // 2**16, positions % 2**16]

with ends[c] = the number of positions below 65,536 (c + 1). Of a matrix of Llama-7B
with 5 % of its entries chosen, the ends are 0.06 % of the support.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.layout import Layout, Origin, Shards
from sparse_jax.supports.scans import cumsum
from sparse_jax.supports.stacks import replicated, resharded

__all__ = ["SHORT_ENTRY", "ShortEntries"]

_CHUNK = 1 << 16


@dataclass(frozen=True)
class ShortEntries(Layout):
    """The entries that `Entries` chooses, two bytes each: shape=(2 C + k,), uint16.

    C chunks of 65,536 entries cover the array. Of an array in S shards, (S, 2 C + c),
    and chunks cover a shard and its positions past the end. What reads or writes
    entries makes int32 positions for it, of one layer of a stack at a time.

    Example:
      >>> support = SHORT_ENTRY.from_positions(np.array([1, 65537]), (2, 65536))[0]
      >>> support.tolist()
      [1, 2, 0, 0, 1, 1]
    """

    dtype = jnp.uint16

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Dimensions of the support of one array."""
        return self._of_positions.ndim

    def sharded(self, shards: Shards | None) -> Layout:
        """Returns the layout of the entries of a sharded array."""
        return ShortEntries(shards)

    def packed_shape(
        self, support: Sequence[int], shape: Sequence[int]
    ) -> tuple[int, ...]:
        """Returns the shape of the positions."""
        return (*support[:-1], support[-1] - 2 * self._chunks(shape))

    def capacity(self, most: float, shape: Sequence[int]) -> int | None:
        """Returns the room of as many positions, and of the ends of the chunks."""
        length = self._of_positions.capacity(most, shape)
        return None if length is None else length + 2 * self._chunks(shape)

    def spec(self, stacked: bool) -> jax.P:
        """Returns the partition of the positions."""
        return self._of_positions.spec(stacked)

    def _empty(self, shape: Sequence[int], k: int, capacity: int | None) -> jax.Array:
        """Returns the empty support of as many positions."""
        one = self._of_positions._empty(shape, k, self._length(capacity, shape))
        return self._short(one, shape)

    def _best(
        self, scores: jax.Array, k: int, capacity: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of the k largest."""
        length = self._length(capacity, scores.shape)
        positions, counts = self._of_positions._best(scores, k, length)
        return self._short(positions, scores.shape), counts

    def without(self, scores: jax.Array, avoid: jax.Array) -> jax.Array:
        """Returns scores with NaN at positions, int32."""
        return self._of_positions.without(scores, avoid)

    def gather(
        self, x: jax.Array, support: jax.Array, layers: jax.Array | None = None
    ) -> jax.Array:
        """Returns packed[i] = x[positions[i]]."""
        if support.ndim == self.ndim:
            return self._of_positions.gather(x, self._positions(support, x.shape))
        x = replicated(x) if self.shards is None else x

        def one(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
            support, number = layer
            positions = self._positions(support, x.shape[1:])
            return self._of_positions.gather(x, positions[None], number[None])[0]

        return lax.map(one, (support, self._numbers(support, layers)))

    def scatter(
        self,
        x: jax.Array,
        support: jax.Array,
        packed: jax.Array,
        layers: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the array with x[positions[i]] = packed[i]."""
        write = self._of_positions.scatter
        if support.ndim == self.ndim:
            return write(x, self._positions(support, x.shape), packed)
        numbers, spec = self._numbers(support, layers), jax.typeof(x).sharding.spec

        def one(i: jax.Array, x: jax.Array) -> jax.Array:
            positions = self._positions(support[i], x.shape[1:])
            return write(x, positions[None], packed[i][None], numbers[i][None])

        x = replicated(x) if self.shards is None else x
        return resharded(lax.fori_loop(0, len(support), one, x), spec)

    def origins(self, old: jax.Array, new: jax.Array, shape: Sequence[int]) -> Origin:
        """Finds the positions of one support in those of another."""
        stacked = old.ndim > self.ndim
        old, new = (self._positions(one, shape, stacked) for one in (old, new))
        return self._of_positions.origins(old, new, shape)

    def to_positions(
        self, support: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns positions in the whole array, and the values at them."""
        one = shape[support.ndim - self.ndim :]
        rows = support.reshape(math.prod(support.shape[:-1]), support.shape[-1])
        lines = [_positions(row, self._chunks(one)) for row in rows]
        packed_shape = self.packed_shape(support.shape, one)
        positions = np.asarray(lines, np.int32).reshape(packed_shape)
        return self._of_positions.to_positions(positions, shape, *packed)

    def from_positions(
        self, positions: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns short positions, and values in their places."""
        one = shape[positions.ndim - 1 :]
        found, *values = self._of_positions.from_positions(positions, shape, *packed)
        rows = found.reshape(math.prod(found.shape[:-1]), found.shape[-1])
        chunks = self._chunks(one)
        lines = [_short(row, chunks) for row in rows]
        length = found.shape[-1] + 2 * chunks
        support = np.asarray(lines, np.uint16).reshape(*found.shape[:-1], length)
        return support, *values

    @property
    def _of_positions(self) -> Layout:
        """The layout of the positions themselves."""
        return ENTRY.sharded(self.shards)

    def _chunks(self, shape: Sequence[int]) -> int:
        """Returns the number of chunks, of an array or of one layer of a stack."""
        if self.shards is None:
            return -(-math.prod(shape) // _CHUNK)
        # Positions past the end are as many as a shard has entries, at most.
        return -(-2 * math.prod(self.shards.block(shape)) // _CHUNK)

    def _length(self, capacity: int | None, shape: Sequence[int]) -> int | None:
        """Returns the positions in a support of some capacity."""
        return None if capacity is None else capacity - 2 * self._chunks(shape)

    def _positions(
        self, support: jax.Array, shape: Sequence[int], stacked: bool = False
    ) -> jax.Array:
        """Returns the positions of a support, int32."""
        rows = lambda x: _over_rows(lambda row: _positions(row, self._chunks(shape)), x)
        return self._on_shards(rows, stacked, "s", "s")(support)

    def _short(self, positions: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Returns the support of positions of one array."""
        rows = lambda x: _over_rows(lambda row: _short(row, self._chunks(shape)), x)
        return self._on_shards(rows, False, "s", "s")(positions)


SHORT_ENTRY = ShortEntries()


def _over_rows(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Maps a function over the last axis."""
    for _ in range(x.ndim - 1):
        function = jax.vmap(function)
    return function(x)


def _short(positions: jax.Array | np.ndarray, chunks: int) -> jax.Array:
    """Returns ascending positions, shape=(k,), as a support."""
    edges = _CHUNK * jnp.arange(1, chunks + 1, dtype=jnp.uint32)
    ends = jnp.searchsorted(jnp.asarray(positions, jnp.uint32), edges)
    parts = (ends % _CHUNK, ends // _CHUNK, positions % _CHUNK)
    return jnp.concatenate([part.astype(jnp.uint16) for part in parts])


def _positions(support: jax.Array | np.ndarray, chunks: int) -> jax.Array:
    """Returns the positions of a support, shape=(k,), int32."""
    wide = jnp.asarray(support, jnp.int32)
    ends = wide[:chunks] + _CHUNK * wide[chunks : 2 * chunks]
    within = wide[2 * chunks :]
    # Where a chunk ends, the positions after it are one chunk further.
    steps = jnp.zeros(within.shape, jnp.int32).at[ends].add(1, mode="drop")
    return within + _CHUNK * cumsum(steps)
