"""Supports of arrays that are cut over a mesh: each device reaches its own entries.

Every shard has a table of positions that count within the shard, so that gathering and
scattering need no communication and no array is ever put together. Shards have
different numbers of chosen entries; the tables are as long as the longest, and unused
slots hold distinct positions behind the end, which read as zero and write nothing.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.params.names import map_named

__all__ = [
    "Cut",
    "LocalSupport",
    "Tables",
    "gather_local",
    "get_in_layers",
    "global_positions",
    "local_tables",
    "map_supports",
    "scatter_local",
    "set_in_layer",
    "unused_tables",
]

# Unused slots are distinct too, and in order.
_DISTINCT: Any = {"unique_indices": True, "indices_are_sorted": True}


class Cut(NamedTuple):
    """How an array, or each layer of a stack, is cut over the axes of a mesh.

    Example:
      >>> cut = Cut((("fsdp",), ()), (4, 1))
      >>> cut.axes, cut.shards, cut.block((8, 6))
      (('fsdp',), 4, (2, 6))
    """

    names: tuple[tuple[str, ...], ...]  # mesh axes of every dimension
    counts: tuple[int, ...]  # parts of every dimension

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes, in the order in which shards are numbered."""
        return tuple(name for names in self.names for name in names)

    @property
    def shards(self) -> int:
        """The number of parts of the array."""
        return math.prod(self.counts)

    @property
    def spec(self) -> jax.P:
        """The partition of the array."""
        return jax.P(*(names or None for names in self.names))

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one shard."""
        return tuple(n // parts for n, parts in zip(shape, self.counts, strict=True))


@dataclass(frozen=True)
class Tables(ABC):
    """A support that is no list of positions in the whole array."""

    positions: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the packed values."""
        return self.positions.shape

    @property
    def ndim(self) -> int:
        """The dimensions of the packed values."""
        return self.positions.ndim

    @property
    @abstractmethod
    def spec(self) -> jax.P:
        """The partition of positions and packed values."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalSupport(Tables):
    """The positions of chosen entries within each shard.

    Packed values have the shape of `positions`; the dimension of the shards lies on
    the same mesh axes as the array.
    """

    positions: jax.Array  # shape=(S, c), or (L, S, c) for a stack; int32
    cut: Cut = field(metadata={"static": True})

    @property
    def spec(self) -> jax.P:
        """The partition of positions and packed values."""
        return _table_spec(self.cut, self.ndim == 3)


def set_in_layer(
    stack: jax.Array,
    layer: jax.Array,
    positions: jax.Array,
    values: jax.Array,
    **options: Any,
) -> jax.Array:
    """Returns a stack with entries of one layer replaced.

    Args:
      stack: shape=(L, ...).
      layer: its number, shape=(), int32.
      positions: row-major flat positions in it, shape=(k,), int32.
      values: shape=(k,), in the dtype of the stack.
      **options: of `.at[].set()`.

    Example:
      >>> set_in_layer(jnp.zeros((2, 2)), 1, jnp.array([1]), jnp.array([5.0]))
      Array([[0., 0.],
             [0., 5.]], dtype=float32)
    """

    def in_place(stack: jax.Array, layer: Any, positions: Any, values: Any) -> Any:
        flat = stack.reshape(stack.shape[0], -1)
        return flat.at[layer, positions].set(values, **options).reshape(stack.shape)

    # A TPU keeps matrices in tiles, and a flat one is another arrangement: of one layer
    # at a time, or it would be a second copy of the stack (measured: 2.7 GiB for the
    # matrices "down" of Llama-7B).
    def layer_alone(stack: jax.Array, layer: Any, positions: Any, values: Any) -> Any:
        matrix = lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
        flat = matrix.reshape(-1).at[positions].set(values, **options)
        return lax.dynamic_update_index_in_dim(
            stack, flat.reshape(matrix.shape), layer, 0
        )

    args = (stack, jnp.asarray(layer, jnp.int32), positions, values)
    return lax.platform_dependent(*args, tpu=layer_alone, default=in_place)


def get_in_layers(
    stack: jax.Array, layers: jax.Array, positions: jax.Array, **options: Any
) -> jax.Array:
    """Returns entries of some layers of a stack.

    Args:
      stack: shape=(L, ...).
      layers: their numbers, shape=(n,), int32.
      positions: row-major flat positions in each, shape=(n, k), int32.
      **options: of `.at[].get()`.

    Example:
      >>> stack = jnp.arange(4.0).reshape(2, 1, 2)
      >>> get_in_layers(stack, jnp.array([1]), jnp.array([[0, 1]]))
      Array([[2., 3.]], dtype=float32)
    """

    def at_once(stack: jax.Array, layers: Any, positions: Any) -> jax.Array:
        flat = stack.reshape(stack.shape[0], -1)
        return flat.at[layers[:, None], positions].get(**options)

    # As `set_in_layer`.
    def layer_alone(stack: jax.Array, layers: Any, positions: Any) -> jax.Array:
        def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
            layer, positions = args
            matrix = lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
            return matrix.reshape(-1).at[positions].get(**options)

        return lax.map(one, (layers, positions))

    args = (stack, layers, positions)
    return lax.platform_dependent(*args, tpu=layer_alone, default=at_once)


def gather_local(
    x: jax.Array, support: LocalSupport, layers: jax.Array | None = None
) -> jax.Array:
    """Returns the entries of an array at a support, 0 in unused slots.

    Like `gather`, without communication.

    Args:
      x: array, or a stack of layers, cut as the support says.
      support: positions; with `layers` of these only.
      layers: numbers of some layers of a stack, shape=(n,), int32; None means all.
    """
    stacked = support.ndim == 3

    def gather(x: jax.Array, positions: jax.Array, layers: Any) -> jax.Array:
        options = {"mode": "fill", "fill_value": 0, **_DISTINCT}
        if not stacked:
            taken = x.reshape(-1).at[positions.reshape(-1)].get(**options)
            return taken.reshape(positions.shape)
        rows = positions.reshape(len(positions), -1)
        numbers = jnp.arange(len(rows)) if layers is None else layers
        return get_in_layers(x, numbers, rows, **options).reshape(positions.shape)

    table = support.spec
    return _mapped(
        gather, support.cut, (_array_spec(support.cut, stacked), table), table
    )(x, support.positions, layers)


def scatter_local(
    x: jax.Array,
    support: LocalSupport,
    packed: jax.Array,
    layers: jax.Array | None = None,
) -> jax.Array:
    """Returns an array with the entries at a support replaced.

    Like `scatter`, without communication; under `jit` with `x` donated, in place.
    """
    stacked = support.ndim == 3

    def scatter(
        x: jax.Array, positions: jax.Array, packed: jax.Array, layers: Any
    ) -> jax.Array:
        stack = x if stacked else x[None]
        count = positions.shape[0] if stacked else 1
        rows, values = positions.reshape(count, -1), packed.reshape(count, -1)

        # Layer by layer, for the reason that `scatter` has.
        def set_layer(i: jax.Array, stack: jax.Array) -> jax.Array:
            layer = i if layers is None else layers[i]
            options = {"mode": "drop", **_DISTINCT}
            coarse = values[i].astype(x.dtype)
            return set_in_layer(stack, layer, rows[i], coarse, **options)

        return lax.fori_loop(0, count, set_layer, stack).reshape(x.shape)

    array, table = _array_spec(support.cut, stacked), support.spec
    return _mapped(scatter, support.cut, (array, table, table), array)(
        x, support.positions, packed, layers
    )


def unused_tables(
    shape: Sequence[int], cut: Cut, capacity: int, stacked: bool
) -> LocalSupport:
    """Returns the support of nothing, with room for `capacity` entries a shard.

    Args:
      shape: of the array, or of the stack.
      cut: of the array, or of one layer.
      capacity: slots of every shard.
      stacked: whether the first axis counts layers.
    """
    size = math.prod(cut.block(shape[1:] if stacked else shape))
    slots = size + jnp.arange(capacity, dtype=jnp.int32)
    tables = (*shape[:1], cut.shards, capacity) if stacked else (cut.shards, capacity)
    return LocalSupport(jnp.broadcast_to(slots, tables), cut)


def map_supports(function: Callable[[str, Any], Any], support: Any) -> Any:
    """Maps `function(name, support)` over the supports of a tree, tables or not."""
    return map_named(function, support, is_leaf=lambda node: isinstance(node, Tables))


def global_positions(
    positions: np.ndarray, cut: Cut, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where local positions lie in the whole array, and their order.

    Args:
      positions: tables of one array or layer, shape=(S, c).
      cut: how the array is cut.
      shape: of the array.

    Returns:
      Row-major flat positions, ascending, shape=(k,), int32; and the places in the
      flattened table they come from, shape=(k,).

    Example:
      >>> cut = Cut(((), ("fsdp",)), (1, 2))  # columns 0 and 1, columns 2 and 3
      >>> tables = np.array([[0, 3], [1, 4]])  # 4 is unused: a shard has 4 entries
      >>> global_positions(tables, cut, (2, 4))
      (array([0, 3, 5], dtype=int32), array([0, 2, 1]))
    """
    block = cut.block(shape)
    shards, slots = np.nonzero(positions < math.prod(block))
    corners = np.stack(np.unravel_index(shards, cut.counts)) * np.array(block)[:, None]
    inside = np.stack(np.unravel_index(positions[shards, slots], block))
    flat = np.asarray(np.ravel_multi_index(tuple(corners + inside), tuple(shape)))
    order = np.argsort(flat, kind="stable")
    places = shards * positions.shape[1] + slots
    return flat[order].astype(np.int32), places[order]


def local_tables(
    support: np.ndarray, cut: Cut, shape: Sequence[int], capacity: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions in the whole array as tables, as `global_positions` undoes.

    Args:
      support: row-major flat positions, ascending, shape=(k,).
      cut: how the array is cut.
      shape: of the array.
      capacity: slots of a shard; None is as many as the fullest needs, at least one.

    Returns:
      Tables, shape=(S, c), int32, and for every slot the number of the position in
      `support`, or -1 if it is unused.

    Example:
      >>> cut = Cut(((), ("fsdp",)), (1, 2))
      >>> tables, places = local_tables(np.array([0, 3, 5]), cut, (2, 4))
      >>> tables.tolist(), places.tolist()
      ([[0, 3], [1, 5]], [[0, 2], [1, -1]])
    """
    block = cut.block(shape)
    where = np.stack(np.unravel_index(support, tuple(shape)))
    blocks = np.array(block)[:, None]
    shards = np.asarray(np.ravel_multi_index(tuple(where // blocks), cut.counts))
    inside = np.asarray(np.ravel_multi_index(tuple(where % blocks), block))
    counts = np.bincount(shards, minlength=cut.shards)
    capacity = max(1, counts.max(initial=0)) if capacity is None else capacity
    size = math.prod(block)
    tables = np.tile(size + np.arange(capacity, dtype=np.int32), (cut.shards, 1))
    places = np.full(tables.shape, -1, np.int64)
    # Positions ascend within a shard because they do in the array.
    order = np.argsort(shards, kind="stable")
    slots = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    tables[shards[order], slots] = inside[order]
    places[shards[order], slots] = order
    return tables, places


def _array_spec(cut: Cut, stacked: bool) -> jax.P:
    """Returns the partition of an array, or of a stack, whose layers are not cut."""
    return jax.P(None, *cut.spec) if stacked else cut.spec


def _table_spec(cut: Cut, stacked: bool) -> jax.P:
    """Returns the partition of tables."""
    return jax.P(None, cut.axes, None) if stacked else jax.P(cut.axes, None)


def _mapped(function: Any, cut: Cut, specs: tuple, out: jax.P) -> Any:
    """Returns a function of local arrays, and of layers, as one of whole arrays."""

    def call(*args: Any) -> jax.Array:
        *arrays, layers = args
        extra = () if layers is None else (jax.P(),)
        local = function if extra else lambda *arrays: function(*arrays, None)
        inputs = arrays if layers is None else [*arrays, layers]
        mapped = jax.shard_map(local, in_specs=(*specs, *extra), out_specs=out)
        return mapped(*inputs)

    return call
