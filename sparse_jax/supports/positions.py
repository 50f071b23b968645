"""Entries by their positions in the whole array, wherever its parts lie.

Files hold positions in whole arrays, so that they do not depend on a mesh. Here they
meet arrays that are sharded over one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.supports.entries import ENTRY, ShardedEntries
from sparse_jax.supports.layout import Layout, Shards

__all__ = [
    "PlacedEntries",
    "fetch",
    "place_entries",
    "read_entries",
    "shards_of",
    "union_of",
    "write_entries",
    "write_in_place",
]

# Equal layouts share a program.
_read = lambda layout, x, support: layout.gather(x, support)
_write = lambda layout, x, support, packed: layout.scatter(x, support, packed)
_gather = jax.jit(_read, static_argnums=0)
_scatter = jax.jit(_write, static_argnums=0)


class PlacedEntries(NamedTuple):
    """Some entries of an array on its devices, ready to be written again and again."""

    layout: Layout
    support: jax.Array
    packed: tuple[jax.Array, ...]  # in the shape of the support


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all of an array on the host, also what other processes hold of it."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    everywhere = jax.NamedSharding(_mesh(x), jax.P())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))


def shards_of(x: jax.Array | np.ndarray, stacked: bool) -> Shards | None:
    """Returns how an array, or each layer of a stack, is sharded; None if it is not."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        return None
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))[int(stacked) :]
    names = tuple(
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in spec
    )
    sizes = sharding.mesh.shape
    counts = tuple(math.prod(sizes[axis] for axis in axes) for axes in names)
    return Shards(names, counts) if any(names) else None


def read_entries(x: jax.Array, positions: np.ndarray) -> np.ndarray:
    """Returns the entries of an array at positions in all of it.

    Args:
      x: array, or a stack of layers; sharded over a mesh or not.
      positions: shape=(k,), or (L, k) for a stack.
    """
    layout, support, _ = place_entries(x, positions)
    packed = fetch(_on_mesh(_gather, layout, x, support))
    return layout.to_positions(fetch(support), x.shape, packed)[1]


def write_entries(x: jax.Array, positions: np.ndarray, values: np.ndarray) -> jax.Array:
    """Returns an array with the entries at positions in all of it replaced.

    Args:
      x: array, or a stack of layers; sharded over a mesh or not.
      positions: shape=(k,), or (L, k) for a stack.
      values: what to write, in the shape of `positions`.
    """
    layout, support, packed = place_entries(x, positions, values)
    return _on_mesh(_scatter, layout, x, support, *packed)


def place_entries(
    x: jax.Array, positions: np.ndarray, *values: np.ndarray
) -> PlacedEntries:
    """Returns entries at positions in all of an array, placed as its parts are.

    Args:
      x: array, or a stack of layers; sharded over a mesh or not.
      positions: shape=(k,), or (L, k) for a stack.
      *values: sets of values, each in the shape of `positions`.
    """
    stacked = positions.ndim == 2
    shards = shards_of(x, stacked)
    if shards is None:
        packed = tuple(map(jnp.asarray, values))
        return PlacedEntries(ENTRY, jnp.asarray(positions), packed)
    layout = ShardedEntries(shards)
    sharding = jax.NamedSharding(_mesh(x), layout.spec(stacked))
    made = layout.from_positions(positions, x.shape, *values)
    support, *packed = (_put(array, sharding) for array in made)
    return PlacedEntries(layout, support, tuple(packed))


def write_in_place(
    x: jax.Array, layout: Layout, support: jax.Array, packed: jax.Array
) -> jax.Array:
    """Returns an array with entries replaced, in the memory of the one it was.

    The array is used up.
    """
    return _on_mesh(_overwrite, layout, x, support, packed)


def union_of(
    supports: Sequence[np.ndarray], avoid: np.ndarray | None = None, size: int = 0
) -> np.ndarray:
    """Returns the positions of several supports, as many in every layer of a stack.

    A layer with fewer takes the first entries that none of them has.

    Args:
      supports: at least one; all of shape=(k,), or (L, k), with a k of its own.
      avoid: positions that layers with fewer take last, of such a shape.
      size: entries of one layer, needed to avoid some.

    Example:
      >>> union_of([np.array([[0, 3], [1, 2]]), np.array([[4], [1]])]).tolist()
      [[0, 3, 4], [0, 1, 2]]
    """
    if supports[0].ndim == 1:
        return np.unique(np.concatenate(supports)).astype(np.int32)
    rows = [np.unique(np.concatenate(row)) for row in zip(*supports, strict=True)]
    most = max(row.size for row in rows)
    last = np.zeros((len(rows), 0), np.int32) if avoid is None else avoid

    def filled(row: np.ndarray, last: np.ndarray) -> np.ndarray:
        others = np.setdiff1d(np.arange(max(most, min(size, most + last.size))), row)
        is_last = np.isin(others, last)
        others = np.concatenate([others[~is_last], others[is_last]])
        return np.union1d(row, others[: most - row.size])

    return np.stack(list(map(filled, rows, last))).astype(np.int32)


# What is donated is written in place.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _overwrite(
    layout: Layout, x: jax.Array, support: jax.Array, packed: jax.Array
) -> jax.Array:
    """Writes the bits of numbers of two bytes.

    On a CPU XLA scatters bfloat16 by way of a float32 copy of the whole array, which
    takes two to three times as long.
    """
    if x.dtype.itemsize != 2:
        return layout.scatter(x, support, packed)
    bits = [lax.bitcast_convert_type(array, jnp.uint16) for array in (x, packed)]
    written = layout.scatter(bits[0], support, bits[1])
    return lax.bitcast_convert_type(written, x.dtype)


def _on_mesh(
    program: Callable[..., jax.Array], layout: Layout, x: jax.Array, *args: jax.Array
) -> jax.Array:
    """Calls a program of a layout, on the mesh of an array that is sharded."""
    if layout == ENTRY:
        return program(layout, x, *args)
    with jax.set_mesh(_mesh(x)):
        return program(layout, x, *args)


def _mesh(x: jax.Array) -> jax.sharding.Mesh:
    """Returns the mesh that an array lies on."""
    sharding = x.sharding
    assert isinstance(sharding, jax.NamedSharding)
    return sharding.mesh  # type: ignore[return-value]


def _put(array: np.ndarray, sharding: jax.NamedSharding) -> jax.Array:
    """Returns an array that every process has, on the devices of a mesh."""
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
