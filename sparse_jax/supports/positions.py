"""Entries by their positions in the whole array, wherever its parts lie.

Files hold positions in whole arrays, so that they do not depend on a mesh. Here they
meet arrays that are sharded over one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.supports.entries import ENTRY, ShardedEntries
from sparse_jax.supports.layout import Shards

__all__ = ["fetch", "read_entries", "shards_of", "write_entries"]

# Equal layouts share a program.
_gather, _scatter = (
    jax.jit(function, static_argnums=0)
    for function in (ShardedEntries.gather, ShardedEntries.scatter)
)


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all of an array on the host, also what other processes hold of it."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    everywhere = jax.NamedSharding(_mesh(x), jax.P())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))


def shards_of(x: jax.Array, stacked: bool) -> Shards | None:
    """Returns how an array, or each layer of a stack, is sharded; None if it is not."""
    sharding = x.sharding
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
    stacked = positions.ndim == 2
    shards = shards_of(x, stacked)
    if shards is None:
        return fetch(ENTRY.gather(x, jnp.asarray(positions)))
    layout = ShardedEntries(shards)
    (support,) = layout.from_positions(positions, x.shape)
    there = _put(support, jax.NamedSharding(_mesh(x), layout.spec(stacked)))
    with jax.set_mesh(_mesh(x)):
        packed = _gather(layout, x, there)
    return layout.to_positions(support, x.shape, fetch(packed))[1]


def write_entries(x: jax.Array, positions: np.ndarray, values: np.ndarray) -> jax.Array:
    """Returns an array with the entries at positions in all of it replaced.

    Args:
      x: array, or a stack of layers; sharded over a mesh or not.
      positions: shape=(k,), or (L, k) for a stack.
      values: what to write, in the shape of `positions`.
    """
    stacked = positions.ndim == 2
    shards = shards_of(x, stacked)
    if shards is None:
        return ENTRY.scatter(x, jnp.asarray(positions), jnp.asarray(values))
    layout = ShardedEntries(shards)
    sharding = jax.NamedSharding(_mesh(x), layout.spec(stacked))
    made = layout.from_positions(positions, x.shape, values)
    with jax.set_mesh(_mesh(x)):
        return _scatter(layout, x, *(_put(array, sharding) for array in made))


def _mesh(x: jax.Array) -> jax.sharding.Mesh:
    """Returns the mesh that an array lies on."""
    sharding = x.sharding
    assert isinstance(sharding, jax.NamedSharding)
    return sharding.mesh  # type: ignore[return-value]


def _put(array: np.ndarray, sharding: jax.NamedSharding) -> jax.Array:
    """Returns an array that every process has, on the devices of a mesh."""
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
