"""Lanes: supports with as many chosen entries in every group of 128.

A group is 128 rows of one column of a matrix, so that rows * columns / 128 groups fill
it; a vector is one column. A support holds row numbers within groups, one byte an
entry, as a table that has the columns of the matrix: on a TPU every column stays in its
lane of the registers, and reaching the entries needs neither gather nor scatter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.supports.lanes_tpu import GROUP, get_rows, has_kernel, set_rows
from sparse_jax.supports.sharded import Cut, Tables, get_in_layers, set_in_layer
from sparse_jax.supports.top_k import key_of

__all__ = [
    "GROUP",
    "LaneSupport",
    "empty_lanes",
    "fits_lanes",
    "gather_lanes",
    "positions_of_lanes",
    "scatter_lanes",
    "top_lanes",
]

_DISTINCT: Any = {"mode": "promise_in_bounds", "unique_indices": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LaneSupport(Tables):
    """The rows of chosen entries within their groups.

    Packed values have the shape of `positions`: m entries of each of G groups in each
    of C columns. Tables are cut over a mesh like their matrix.
    """

    positions: jax.Array  # shape=(m, G, C), or (L, m, G, C) for a stack; uint8
    cut: Cut | None = field(default=None, metadata={"static": True})

    @property
    def spec(self) -> jax.P:
        """The partition of positions and packed values."""
        if self.cut is None:
            return jax.P()
        return _table_spec(self.cut, self.ndim == 4)


def fits_lanes(shape: Sequence[int], cut: Cut | None = None) -> bool:
    """Returns whether groups fill an array, and each of its shards.

    Example:
      >>> fits_lanes((256, 10)), fits_lanes((10, 256)), fits_lanes((384,))
      (True, False, True)
    """
    rows = shape[0] if cut is None else cut.block(shape)[0]
    return len(shape) in (1, 2) and rows % GROUP == 0


def empty_lanes(
    shape: Sequence[int], count: int, stacked: bool, cut: Cut | None = None
) -> LaneSupport:
    """Returns a support that holds nothing yet: any distinct entries.

    Args:
      shape: of the array, or of the stack.
      count: entries of a group.
      stacked: whether the first axis counts layers.
      cut: how the array, or each layer, is cut over a mesh.
    """
    rows, *columns = shape[1:] if stacked else shape
    tables = (count, rows // GROUP, *(columns or (1,)))
    tables = (*shape[:1], *tables) if stacked else tables
    rows = lax.broadcasted_iota(jnp.uint8, tables, int(stacked))
    return LaneSupport(rows, cut)


def top_lanes(x: jax.Array, count: int, cut: Cut | None = None) -> LaneSupport:
    """Returns the entries of largest magnitude of every group.

    As in `top_k_support`, equal magnitudes go to the lower row, and what is not finite
    ranks below zero. No entry leaves its device.

    Args:
      x: shape=(128 * G,) or (128 * G, C).
      count: entries of a group, in [1, 128].
      cut: how `x` is cut over a mesh.

    Example:
      >>> top_lanes(jnp.arange(128.0) % 100, 2).positions.ravel()
      Array([98, 99], dtype=uint8)
    """

    def select(x: jax.Array) -> jax.Array:
        keys = key_of(x).reshape(-1, GROUP, *(x.shape[1:] or (1,)))
        numbers = lax.broadcasted_iota(jnp.int32, keys.shape, 1)

        # Two or three rounds a percent of density, each one pass without a sort.
        def best(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
            keys, chosen = state
            row = lax.argmax(keys, 1, jnp.int32)
            keys = jnp.where(numbers == row[:, None], -1, keys)
            return keys, lax.dynamic_update_index_in_dim(chosen, row, j, 0)

        empty = jnp.zeros((count, keys.shape[0], keys.shape[2]), jnp.int32)
        chosen = lax.fori_loop(0, count, best, (keys, empty))[1]
        return jnp.sort(chosen, axis=0).astype(jnp.uint8)

    if cut is None:
        return LaneSupport(select(x))
    table = _table_spec(cut, False)
    return LaneSupport(_mapped(select, (cut.spec,), table)(x), cut)


def gather_lanes(
    x: jax.Array, support: LaneSupport, layers: jax.Array | None = None
) -> jax.Array:
    """Returns the entries of an array at a support; the arguments are of `gather`.

    packed[j, g, c] = x[128 * g + positions[j, g, c], c]
    """
    stacked = support.ndim == 4

    def gather(x: jax.Array, rows: jax.Array, layers: jax.Array) -> jax.Array:
        stack, tables = (x, rows) if stacked else (x[None], rows[None])
        return _get(stack, layers, tables).reshape(rows.shape)

    if support.cut is not None:
        array, table = _array_spec(support.cut, stacked), support.spec
        gather = _mapped(gather, (array, table, jax.P()), table)
    return gather(x, support.positions, _numbers(support, layers))


def scatter_lanes(
    x: jax.Array,
    support: LaneSupport,
    packed: jax.Array,
    layers: jax.Array | None = None,
) -> jax.Array:
    """Returns an array with the entries at a support replaced; as `scatter`."""
    stacked = support.ndim == 4

    def scatter(
        x: jax.Array, rows: jax.Array, packed: jax.Array, layers: jax.Array
    ) -> jax.Array:
        if stacked:
            return _set(x, layers, rows, packed)
        return _set(x[None], layers, rows[None], packed[None]).reshape(x.shape)

    if support.cut is not None:
        array, table = _array_spec(support.cut, stacked), support.spec
        scatter = _mapped(scatter, (array, table, table, jax.P()), array)
    numbers = _numbers(support, layers)
    return scatter(x, support.positions, packed.astype(x.dtype), numbers)


def positions_of_lanes(rows: np.ndarray, *packed: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns positions in the whole array, and packed values in their order.

    Args:
      rows: shape=(m, G, C), or (L, m, G, C) for a stack.
      *packed: arrays in this shape.

    Returns:
      Row-major flat positions, ascending, shape=(k,) or (L, k), int32, and the values.

    Example:
      >>> rows = np.array([[[0, 1]], [[2, 5]]])  # two of 128 rows, in two columns
      >>> positions_of_lanes(rows)[0]
      array([ 0,  3,  4, 11], dtype=int32)
    """
    _, groups, columns = rows.shape[-3:]
    first = GROUP * np.arange(groups, dtype=np.int32)[:, None]
    flat = (first + rows) * columns + np.arange(columns, dtype=np.int32)
    lines = [array.reshape(*rows.shape[:-3], -1) for array in (flat, *packed)]
    order = np.argsort(lines[0], axis=-1, kind="stable")
    positions, *values = (np.take_along_axis(line, order, -1) for line in lines)
    return positions.astype(np.int32), *values


def _numbers(support: LaneSupport, layers: jax.Array | None) -> jax.Array:
    """Returns the numbers of the layers that a support is about."""
    count = support.shape[0] if support.ndim == 4 else 1
    return jnp.arange(count, dtype=jnp.int32) if layers is None else layers


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

    def by_position(stack: jax.Array, layers: Any, rows: Any, values: Any) -> jax.Array:
        flat, lines = (x.reshape(len(rows), -1) for x in (_flat(rows), values))

        # Layer by layer, for the reason that `scatter` has.
        def set_layer(i: jax.Array, stack: jax.Array) -> jax.Array:
            return set_in_layer(stack, layers[i], flat[i], lines[i], **_DISTINCT)

        return lax.fori_loop(0, len(rows), set_layer, stack)

    if stack.ndim == 2 or not has_kernel(stack.dtype, rows.shape[1]):
        return by_position(stack, layers, rows, values)
    args = (stack, layers, rows, values)
    return lax.platform_dependent(*args, tpu=set_rows, default=by_position)


def _flat(rows: jax.Array) -> jax.Array:
    """Returns the positions within a layer that rows of groups have, int32."""
    group, column = (lax.broadcasted_iota(jnp.int32, rows.shape, dim) for dim in (2, 3))
    return (group * GROUP + rows.astype(jnp.int32)) * rows.shape[3] + column


def _array_spec(cut: Cut, stacked: bool) -> jax.P:
    """Returns the partition of an array, or of a stack, whose layers are not cut."""
    return jax.P(None, *cut.spec) if stacked else cut.spec


def _table_spec(cut: Cut, stacked: bool) -> jax.P:
    """Returns the partition of tables: groups as rows, and columns as columns."""
    parts = (None, *cut.spec, *[None] * (2 - len(cut.spec)))
    return jax.P(None, *parts) if stacked else jax.P(*parts)


def _mapped(function: Any, specs: tuple, out: jax.P) -> Any:
    """Returns a function of the shards of arrays as one of whole arrays."""
    # Kernels do not say over which axes their results vary.
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)
