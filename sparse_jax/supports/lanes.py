"""The layout of lanes: as many chosen entries in every group of 128.

A group is 128 rows of one column of a matrix, or at its end what is left of them; a
vector is one column. A support holds row numbers within groups, one byte an
entry, as a table that has the columns of the matrix: on a TPU every column stays in its
lane of the registers, and reaching the entries needs neither gather nor scatter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.supports.lanes_tpu import GROUP, get_rows, has_kernel, set_rows
from sparse_jax.supports.layout import Layout, Origin, Shards, support_size
from sparse_jax.supports.stacks import (
    SetOptions,
    get_in_layers,
    replicated,
    resharded,
    set_in_layers,
)
from sparse_jax.supports.top_k import key_of

__all__ = ["LANE", "Lanes"]

_DISTINCT: SetOptions = {"mode": "promise_in_bounds", "unique_indices": True}


@dataclass(frozen=True)
class Lanes(Layout):
    """The best entries of every 128 rows of a column: shape=(m, G, C), uint8.

    m rows of each of G groups in each of C columns, sharded like their matrix. The last
    group of a column may have fewer rows than 128, and has as many entries.
    """

    ndim = 3
    dtype = jnp.uint8

    def sharded(self, shards: Shards | None) -> Layout:
        """Returns the lanes of a sharded array."""
        return Lanes(shards)

    def require(self, name: str, shape: Sequence[int]) -> None:
        """Raises unless groups cover the array, and fill each of its shards.

        Example:
          >>> Lanes().require("kernel", (576, 10))
        """
        if len(shape) not in (1, 2):
            raise InputError(
                f"`{name}` must be a matrix or a vector to be trained by lanes, got "
                f"shape {list(shape)}. Leave it out of `where`, or take the "
                "granularity of entries."
            )
        if self.shards is None or self.shards.counts[0] == 1:
            return
        if self.shards.block(shape)[0] % GROUP:
            raise InputError(
                f"`{name}` must have a multiple of {GROUP} rows on every device to be "
                f"trained by lanes, got {shape[0]} rows in {self.shards.counts[0]} "
                "parts. Take a mesh that splits them less, or the granularity of "
                "entries."
            )

    def size(self, density: float | Fraction, shape: Sequence[int]) -> int:
        """Returns ceil(density * 128) for every group.

        Raises:
          InputError: if the last group of a column has fewer rows.
        """
        count, last = support_size(density, GROUP), (shape[0] - 1) % GROUP + 1
        if count > last:
            raise InputError(
                f"`density` must be at most {last / GROUP:g} in lanes of {shape[0]} "
                f"rows, whose last group of {GROUP} has {last}, got {float(density):g}."
                " Leave such arrays out of `where`, or take the granularity of entries."
            )
        return count * _groups(shape)

    def spec(self, stacked: bool) -> jax.P:
        """Returns the partition of the array: groups as rows, columns as columns."""
        if self.shards is None:
            return jax.P()
        parts = self.shards.spec()
        lead = (None,) * (stacked + 1)
        return jax.P(*lead, *parts, *[None] * (2 - len(parts)))

    def _empty(self, shape: Sequence[int], k: int, capacity: int | None) -> jax.Array:
        """Returns the first rows of every group."""
        del capacity
        table = (k // _groups(shape), -(-shape[0] // GROUP), *(shape[1:] or (1,)))
        return lax.broadcasted_iota(jnp.uint8, table, 0)

    def _best(
        self, scores: jax.Array, k: int, capacity: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the rows of largest magnitude of every group.

        As in `top_k_support`, equal magnitudes go to the lower row, and what is not
        finite ranks below zero. No entry leaves its device.
        """
        del capacity
        count = k // _groups(scores.shape)

        def select(x: jax.Array) -> jax.Array:
            keys = key_of(x).reshape(x.shape[0], *(x.shape[1:] or (1,)))
            # What fills the last group is never chosen.
            missing = -x.shape[0] % GROUP
            keys = jnp.pad(keys, ((0, missing), (0, 0)), constant_values=-1)
            keys = keys.reshape(-1, GROUP, keys.shape[1])
            numbers = lax.broadcasted_iota(jnp.int32, keys.shape, 1)

            # Two or three rounds a percent of density, each one pass without a sort.
            def best(
                j: jax.Array, state: tuple[jax.Array, jax.Array]
            ) -> tuple[jax.Array, jax.Array]:
                keys, chosen = state
                row = lax.argmax(keys, 1, jnp.int32)
                keys = jnp.where(numbers == row[:, None], -1, keys)
                return keys, lax.dynamic_update_index_in_dim(chosen, row, j, 0)

            empty = jnp.zeros((count, keys.shape[0], keys.shape[2]), jnp.int32)
            chosen = lax.fori_loop(0, count, best, (keys, empty))[1]
            return jnp.sort(chosen, axis=0).astype(jnp.uint8)

        rows = self._on_shards(select, False, "x", "s")(scores)
        return rows, jnp.full(rows.shape[:-1], rows.shape[-1], jnp.int32)

    def gather(
        self, x: jax.Array, support: jax.Array, layers: jax.Array | None = None
    ) -> jax.Array:
        """Returns packed[j, g, c] = x[128 * g + support[j, g, c], c]."""
        stacked = support.ndim > self.ndim
        if self.shards is None:
            x = replicated(x)

        def gather(x: jax.Array, rows: jax.Array, layers: jax.Array) -> jax.Array:
            stack, tables = (x, rows) if stacked else (x[None], rows[None])
            return _get(stack, layers, tables).reshape(rows.shape)

        function = self._on_shards(gather, stacked, "xsn", "p")
        return function(x, support, self._numbers(support, layers))

    def scatter(
        self,
        x: jax.Array,
        support: jax.Array,
        packed: jax.Array,
        layers: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the array with the entries that `gather` reads replaced."""
        stacked, spec = support.ndim > self.ndim, jax.typeof(x).sharding.spec
        if self.shards is None:
            x = replicated(x)

        def scatter(
            x: jax.Array, rows: jax.Array, packed: jax.Array, layers: jax.Array
        ) -> jax.Array:
            if stacked:
                return _set(x, layers, rows, packed)
            return _set(x[None], layers, rows[None], packed[None]).reshape(x.shape)

        function = self._on_shards(scatter, stacked, "xspn", "x")
        numbers = self._numbers(support, layers)
        return resharded(function(x, support, packed.astype(x.dtype), numbers), spec)

    def origins(self, old: jax.Array, new: jax.Array, shape: Sequence[int]) -> Origin:
        """Finds the rows of groups in those of before."""
        del shape
        axis = -self.ndim

        def look(i: jax.Array, place: jax.Array) -> jax.Array:
            one = lax.dynamic_index_in_dim(old, i, axis)
            return jnp.where(new == one, jnp.int32(i), place)

        nowhere = jnp.full(new.shape, -1, jnp.int32)
        place = lax.fori_loop(0, old.shape[axis], look, nowhere)
        return Origin(jnp.maximum(place, 0), place >= 0, axis)

    def to_positions(
        self, support: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns positions in the whole array, and the values at them.

        Example:
          >>> rows = np.array([[[0, 1]], [[2, 5]]])  # two of 128 rows, in two columns
          >>> LANE.to_positions(rows, (128, 2))[0]
          array([ 0,  3,  4, 11], dtype=int32)
        """
        del shape
        _, groups, columns = support.shape[-3:]
        first = GROUP * np.arange(groups, dtype=np.int32)[:, None]
        flat = (first + support) * columns + np.arange(columns, dtype=np.int32)
        lines = [array.reshape(*support.shape[:-3], -1) for array in (flat, *packed)]
        order = np.argsort(lines[0], axis=-1, kind="stable")
        positions, *values = (np.take_along_axis(line, order, -1) for line in lines)
        return positions.astype(np.int32), *values

    def from_positions(
        self, positions: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns rows of groups, and values in their places.

        Example:
          >>> LANE.from_positions(np.array([0, 3, 4, 11]), (128, 2))[0].tolist()
          [[[0, 1]], [[2, 5]]]
        """
        rows, *columns = shape[positions.ndim - 1 :]
        groups, width = -(-rows // GROUP), (columns or [1])[0]
        row, column = np.divmod(positions, width)
        # Groups of a column one after the other, each in the order of its rows.
        order = np.argsort(row // GROUP * width + column, axis=-1, kind="stable")
        table = (*positions.shape[:-1], groups, width, -1)
        return tuple(
            np.moveaxis(np.take_along_axis(line, order, -1).reshape(table), -1, -3)
            for line in ((row % GROUP).astype(np.uint8), *packed)
        )


LANE = Lanes()


def _groups(shape: Sequence[int]) -> int:
    """Returns how many groups an array has."""
    return -(-shape[0] // GROUP) * math.prod(shape[1:])


def _get(stack: jax.Array, layers: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns entries of some layers of a stack, in the shape of their rows."""

    def by_position(stack: jax.Array, layers: jax.Array, rows: jax.Array) -> jax.Array:
        flat = _flat(rows).reshape(len(rows), -1)
        return get_in_layers(stack, layers, flat, **_DISTINCT).reshape(rows.shape)

    if stack.ndim == 2 or not has_kernel(stack.dtype, rows.shape[1]):
        return by_position(stack, layers, rows)
    args = (stack, layers, rows)
    return lax.platform_dependent(*args, tpu=get_rows, default=by_position)


def _set(
    stack: jax.Array, layers: jax.Array, rows: jax.Array, values: jax.Array
) -> jax.Array:
    """Returns a stack with entries of some layers replaced."""

    def by_position(
        stack: jax.Array, layers: jax.Array, rows: jax.Array, values: jax.Array
    ) -> jax.Array:
        flat, lines = (x.reshape(len(rows), -1) for x in (_flat(rows), values))
        return set_in_layers(stack, layers, flat, lines, **_DISTINCT)

    if stack.ndim == 2 or not has_kernel(stack.dtype, rows.shape[1]):
        return by_position(stack, layers, rows, values)
    args = (stack, layers, rows, values)
    return lax.platform_dependent(*args, tpu=set_rows, default=by_position)


def _flat(rows: jax.Array) -> jax.Array:
    """Returns the positions within a layer that rows of groups have, int32."""
    group, column = (lax.broadcasted_iota(jnp.int32, rows.shape, dim) for dim in (2, 3))
    return (group * GROUP + rows.astype(jnp.int32)) * rows.shape[3] + column
