"""Entries by their positions in the whole array, wherever its parts lie.

Files hold positions in whole arrays, so that they do not depend on a mesh. Here they
meet arrays that are cut over one.
"""

import math
from typing import Any

import jax
import numpy as np

from sparse_jax.supports.lanes import LaneSupport, positions_of_lanes
from sparse_jax.supports.sharded import (
    Cut,
    LocalSupport,
    gather_local,
    global_positions,
    local_tables,
    scatter_local,
)
from sparse_jax.supports.support import gather, scatter

__all__ = ["canonical", "fetch", "read_entries", "tables_of", "write_entries"]


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all of an array on the host, also what other processes hold of it."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    sharding: Any = x.sharding
    everywhere = jax.NamedSharding(sharding.mesh, jax.P())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))


def canonical(
    support: jax.Array | np.ndarray | LocalSupport | LaneSupport,
    shape: tuple[int, ...],
    *packed: jax.Array | np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Returns positions in the whole array, and packed values in their order.

    Args:
      support: shape=(k,), or (L, k) for a stack; or tables.
      shape: of the array, or of the stack.
      *packed: arrays in the shape of the support.

    Returns:
      Positions, shape=(k,) or (L, k), int32, ascending, and the values at them.
    """
    if isinstance(support, LaneSupport):
        return positions_of_lanes(*map(fetch, (support.positions, *packed)))
    if not isinstance(support, LocalSupport):
        return tuple(fetch(array) for array in (support, *packed))
    tables = fetch(support.positions)
    values = [fetch(array) for array in packed]
    if support.ndim == 2:
        return _canonical(tables, support.cut, shape, values)
    layers = [
        _canonical(rows, support.cut, shape[1:], [array[i] for array in values])
        for i, rows in enumerate(tables)
    ]
    return tuple(np.stack(arrays) for arrays in zip(*layers, strict=True))


def tables_of(
    support: np.ndarray,
    cut: Cut,
    shape: tuple[int, ...],
    *packed: np.ndarray,
    capacity: int | None = None,
) -> tuple[np.ndarray, ...]:
    """Returns local tables, and packed values in their slots, as `canonical` undoes.

    Args:
      support: positions in the whole array, shape=(k,), or (L, k) for a stack.
      cut: how the array, or each layer, is cut.
      shape: of the array, or of the stack.
      *packed: arrays in the shape of `support`.
      capacity: slots of a shard; None is as many as the fullest needs.
    """
    if support.ndim == 1:
        return _tables(support, cut, shape, packed, capacity)
    if capacity is None:
        capacity = max(local_tables(row, cut, shape[1:])[0].shape[1] for row in support)
    layers = [
        _tables(row, cut, shape[1:], [array[i] for array in packed], capacity)
        for i, row in enumerate(support)
    ]
    return tuple(np.stack(arrays) for arrays in zip(*layers, strict=True))


def read_entries(x: jax.Array, support: np.ndarray) -> np.ndarray:
    """Returns the entries of an array at positions in all of it.

    Args:
      x: array, or a stack of layers; cut over a mesh or not.
      support: positions, shape=(k,), or (L, k) for a stack.
    """
    cut = _cut_of(x, support.ndim == 2)
    if cut is None:
        return fetch(gather(x, jax.numpy.asarray(support)))
    local = _placed(x, cut, tables_of(support, cut, x.shape)[0])
    with jax.set_mesh(_mesh(x)):
        packed = jax.jit(gather_local)(x, local)
    return canonical(local, x.shape, packed)[1]


def write_entries(x: jax.Array, support: np.ndarray, values: np.ndarray) -> jax.Array:
    """Returns an array with the entries at positions in all of it replaced.

    Args:
      x: array, or a stack of layers; cut over a mesh or not.
      support: positions, shape=(k,), or (L, k) for a stack.
      values: what to write, in the shape of `support`.
    """
    cut = _cut_of(x, support.ndim == 2)
    if cut is None:
        return scatter(x, jax.numpy.asarray(support), jax.numpy.asarray(values))
    tables, slots = tables_of(support, cut, x.shape, values)
    local = _placed(x, cut, tables)
    packed = _put(slots, local.positions.sharding)
    with jax.set_mesh(_mesh(x)):
        return jax.jit(scatter_local)(x, local, packed)


def _canonical(
    tables: np.ndarray, cut: Cut, shape: tuple[int, ...], values: Any
) -> tuple[np.ndarray, ...]:
    """Returns positions and values of one array."""
    positions, places = global_positions(tables, cut, shape)
    return positions, *(array.reshape(-1)[places] for array in values)


def _tables(
    support: np.ndarray,
    cut: Cut,
    shape: tuple[int, ...],
    packed: Any,
    capacity: int | None,
) -> tuple[np.ndarray, ...]:
    """Returns tables and slots of one array; unused slots hold zero."""
    tables, places = local_tables(support, cut, shape, capacity)
    slots = [np.where(places < 0, 0, array[places]) for array in packed]
    return tables, *(s.astype(a.dtype) for s, a in zip(slots, packed, strict=True))


def _cut_of(x: jax.Array, stacked: bool) -> Cut | None:
    """Returns how an array, or each layer of a stack, is cut, None if it is not."""
    sharding = x.sharding
    if not isinstance(sharding, jax.NamedSharding):
        return None
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))[int(stacked) :]
    names = tuple(
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in spec
    )
    if not any(names):
        return None
    sizes = sharding.mesh.shape
    return Cut(names, tuple(math.prod(sizes[axis] for axis in axes) for axes in names))


def _mesh(x: jax.Array) -> jax.sharding.Mesh:
    """Returns the mesh that an array lies on."""
    sharding: Any = x.sharding
    return sharding.mesh


def _placed(x: jax.Array, cut: Cut, tables: np.ndarray) -> LocalSupport:
    """Returns tables on the devices that hold the parts of an array."""
    local = LocalSupport(tables, cut)  # type: ignore[arg-type]
    return LocalSupport(_put(tables, jax.NamedSharding(_mesh(x), local.spec)), cut)


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    """Returns an array that every process has, on the devices of a mesh."""
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
