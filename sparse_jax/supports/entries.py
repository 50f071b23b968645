"""The layouts of single entries: row-major flat positions, ascending and distinct.

Positions in a stack count within a layer, so that int32 suffices however deep it is.

Of an array that is sharded, each device reaches its own entries: every shard has a row
of positions that count within the shard, so that gathering and scattering need no
communication and no array is ever put together. Shards have different numbers of chosen
entries; rows are as long as the longest, and what is left holds distinct positions past
the end, which read as zero and write nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.supports.layout import Layout, Shards
from sparse_jax.supports.stacks import (
    GetOptions,
    SetOptions,
    get_in_layers,
    replicated,
    resharded,
    set_in_layers,
)
from sparse_jax.supports.top_k import top_k_in_shards, top_k_support

__all__ = ["ENTRY", "Entries", "ShardedEntries"]

# Distinct indices matter beyond speed: float32 scatters that may collide compile to a
# compare-and-swap loop on GPU in jaxlib 0.10.2 (jax issue 38806).
_DISTINCT: SetOptions = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
}
# Positions past the end are distinct too, and in order.
_IN_SHARDS: SetOptions = {"unique_indices": True, "indices_are_sorted": True}
# Rows end at a multiple of this, the width of a vector register of a TPU.
_REGISTER = 128


@dataclass(frozen=True)
class Entries(Layout):
    """The best entries of an array, wherever they are: shape=(k,), int32."""

    ndim = 1

    def sharded(self, shards: Shards | None) -> Layout:
        """Returns the layout of the entries of a sharded array."""
        return self if shards is None else ShardedEntries(shards)

    def spec(self, stacked: bool) -> jax.P:
        """Returns a partition that puts all of it on every device."""
        del stacked
        return jax.P()

    def _empty(self, shape: Sequence[int], k: int, capacity: int | None) -> jax.Array:
        """Returns zeros."""
        del shape, capacity
        return jnp.zeros(k, jnp.int32)

    def _best(
        self, scores: jax.Array, k: int, capacity: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of the k largest."""
        del capacity
        return top_k_support(scores, k), jnp.full([], k, jnp.int32)

    def gather(
        self, x: jax.Array, support: jax.Array, layers: jax.Array | None = None
    ) -> jax.Array:
        """Returns packed[i] = x[support[i]]."""
        x = replicated(x)
        if support.ndim == 1:
            return x.reshape(-1).at[support].get(**_DISTINCT)
        return get_in_layers(x, self._numbers(support, layers), support, **_DISTINCT)

    def scatter(
        self,
        x: jax.Array,
        support: jax.Array,
        packed: jax.Array,
        layers: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the array with x[support[i]] = packed[i]."""
        spec, x = jax.typeof(x).sharding.spec, replicated(x)
        if support.ndim == 1:
            flat = x.reshape(-1).at[support].set(packed.astype(x.dtype), **_DISTINCT)
            return resharded(flat.reshape(x.shape), spec)
        numbers = self._numbers(support, layers)
        new = set_in_layers(x, numbers, support, packed, **_DISTINCT)
        return resharded(new, spec)

    def to_positions(
        self, support: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns its arguments: the support is positions already."""
        del shape
        return support, *packed

    def from_positions(
        self, positions: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns its arguments."""
        del shape
        return positions, *packed


ENTRY = Entries()


@dataclass(frozen=True)
class ShardedEntries(Layout):
    """The positions of chosen entries within each of S shards: shape=(S, c), int32.

    The axis of the shards lies on the same mesh axes as the array.
    """

    ndim = 2

    shards: Shards  # type: ignore[assignment]

    def sharded(self, shards: Shards | None) -> Layout:
        """Returns the layout for other shards."""
        return ENTRY.sharded(shards)

    def spec(self, stacked: bool) -> jax.P:
        """Returns the axes of the array for the axis of the shards."""
        return jax.P(*(None,) * stacked, self.shards.axes, None)

    def capacity(self, most: float, shape: Sequence[int]) -> int | None:
        """Returns a length that ends at a full register, or with the shard.

        Example:
          >>> layout = ShardedEntries(Shards((("fsdp",),), (2,)))
          >>> layout.capacity(130, (2000,)), layout.capacity(130, (400,))
          (256, 200)
        """
        registers = max(1, math.ceil(most / _REGISTER))
        return min(math.prod(shape) // self.shards.number, registers * _REGISTER)

    def _empty(self, shape: Sequence[int], k: int, capacity: int | None) -> jax.Array:
        """Returns positions past the end."""
        row = math.prod(self.shards.block(shape)) + jnp.arange(
            k if capacity is None else capacity, dtype=jnp.int32
        )
        return jnp.broadcast_to(row, (self.shards.number, row.size))

    def _best(
        self, scores: jax.Array, k: int, capacity: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of the k largest of the whole array."""
        return top_k_in_shards(
            scores, k, self.shards, k if capacity is None else capacity
        )

    def gather(
        self, x: jax.Array, support: jax.Array, layers: jax.Array | None = None
    ) -> jax.Array:
        """Returns the entries of each shard, 0 where there are none."""
        stacked = support.ndim > self.ndim
        options: GetOptions = {"mode": "fill", "fill_value": 0, **_IN_SHARDS}

        def gather(x: jax.Array, support: jax.Array, layers: jax.Array) -> jax.Array:
            if not stacked:
                taken = x.reshape(-1).at[support.reshape(-1)].get(**options)
                return taken.reshape(support.shape)
            rows = support.reshape(len(support), -1)
            return get_in_layers(x, layers, rows, **options).reshape(support.shape)

        function = self._on_shards(gather, stacked, "xsn", "p")
        return function(x, support, self._numbers(support, layers))

    def scatter(
        self,
        x: jax.Array,
        support: jax.Array,
        packed: jax.Array,
        layers: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the array with the entries of each shard replaced."""
        stacked = support.ndim > self.ndim

        def scatter(
            x: jax.Array, support: jax.Array, packed: jax.Array, layers: jax.Array
        ) -> jax.Array:
            stack, count = (x, len(support)) if stacked else (x[None], 1)
            rows, values = support.reshape(count, -1), packed.reshape(count, -1)
            options: SetOptions = {"mode": "drop", **_IN_SHARDS}
            return set_in_layers(stack, layers, rows, values, **options).reshape(
                x.shape
            )

        function = self._on_shards(scatter, stacked, "xspn", "x")
        return function(x, support, packed, self._numbers(support, layers))

    def to_positions(
        self, support: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns positions in the whole array, and the values at them.

        Example:
          >>> layout = ShardedEntries(Shards(((), ("fsdp",)), (1, 2)))
          >>> rows = np.array([[0, 3], [1, 4]])  # 4 is past the end
          >>> layout.to_positions(rows, (2, 4), np.array([[1, 2], [3, 0]]))
          (array([0, 3, 5], dtype=int32), array([1, 3, 2]))
        """
        if support.ndim > self.ndim:
            layers = [
                self.to_positions(row, shape[1:], *(array[i] for array in packed))
                for i, row in enumerate(support)
            ]
            return tuple(np.stack(arrays) for arrays in zip(*layers, strict=True))
        block = self.shards.block(shape)
        shards, places = np.nonzero(support < math.prod(block))
        corners = np.stack(np.unravel_index(shards, self.shards.counts))
        corners *= np.array(block)[:, None]
        inside = np.stack(np.unravel_index(support[shards, places], block))
        flat = np.asarray(np.ravel_multi_index(tuple(corners + inside), tuple(shape)))
        order = np.argsort(flat, kind="stable")
        values = [array[shards, places][order] for array in packed]
        return flat[order].astype(np.int32), *values

    def from_positions(
        self, positions: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns rows as long as the fullest shard needs, and values, 0 past the end.

        Example:
          >>> layout = ShardedEntries(Shards(((), ("fsdp",)), (1, 2)))
          >>> rows, = layout.from_positions(np.array([0, 3, 5]), (2, 4))
          >>> rows.tolist()
          [[0, 3], [1, 5]]
        """
        if positions.ndim > 1:
            layers = [
                self.from_positions(row, shape[1:], *(array[i] for array in packed))
                for i, row in enumerate(positions)
            ]
            capacity = max(rows.shape[1] for rows, *_ in layers)
            stacks = self._unused(shape[1:], (len(layers),), capacity, packed)
            for i, layer in enumerate(layers):
                for stack, rows in zip(stacks, layer, strict=True):
                    stack[i, :, : rows.shape[1]] = rows
            return stacks
        block = self.shards.block(shape)
        where = np.stack(np.unravel_index(positions, tuple(shape)))
        blocks = np.array(block)[:, None]
        corners, inside = tuple(where // blocks), tuple(where % blocks)
        shards = np.asarray(np.ravel_multi_index(corners, self.shards.counts))
        counts = np.bincount(shards, minlength=self.shards.number)
        # Positions ascend within a shard because they do in the array.
        order = np.argsort(shards, kind="stable")
        places = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = self._unused(shape, (), max(1, counts.max(initial=0)), packed)
        values = (np.asarray(np.ravel_multi_index(inside, block)), *packed)
        for rows, array in zip(found, values, strict=True):
            rows[shards[order], places] = array[order]
        return found

    def _unused(
        self,
        shape: Sequence[int],
        layers: tuple[int, ...],
        capacity: int,
        packed: Sequence[np.ndarray],
    ) -> tuple[np.ndarray, ...]:
        """Returns supports that hold nothing, and zeros as what is packed for them."""
        support = (*layers, self.shards.number, capacity)
        end = math.prod(self.shards.block(shape))
        empty = np.broadcast_to(end + np.arange(capacity, dtype=np.int32), support)
        return np.array(empty), *(np.zeros(support, array.dtype) for array in packed)
