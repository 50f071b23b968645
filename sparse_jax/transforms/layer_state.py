"""Rows: optimizer state with one row for each layer, of which some are updated."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

__all__ = [
    "init_rows",
    "put_rows",
    "restart_rows",
    "row_norms",
    "take_rows",
    "update_rows",
    "where",
]

Rows = TypeVar("Rows")
_OnLeaf = Callable[[jax.Array, jax.Array], jax.Array]

# What counts the updates of the model rather than of a layer: a learning rate falls
# for all layers alike, as under a scheduler of PyTorch, while Adam's bias correction
# counts the updates of its layer.
_SCHEDULES = (optax.ScaleByScheduleState,)
_INJECTED = (
    optax.schedules.InjectHyperparamsState,
    optax.schedules.InjectStatefulHyperparamsState,
)


def init_rows(
    tx: optax.GradientTransformation, stacked: optax.Params, num_rows: int
) -> optax.OptState:
    """Returns the state of every layer, from leaves of shape (num_rows, ...)."""
    # The number is needed for a tree without leaves, such as the placeholder of
    # `optax.tree.map_params`.
    return jax.vmap(tx.init, axis_size=num_rows)(stacked)


def update_rows(
    tx: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    **extra_args: object,
) -> tuple[optax.Updates, optax.OptState]:
    """Updates every row on its own: `tx` sees one layer at a time."""

    update = lambda *row: tx.update(*row, **extra_args)
    return jax.vmap(update)(updates, state, params)


def take_rows(tree: Rows, active: jax.Array) -> Rows:
    """Returns the rows of the active layers.

    Example:
      >>> take_rows(jnp.array([1, 2, 3]), jnp.array([0, 2]))
      Array([1, 3], dtype=int32)
    """

    def take(leaf: jax.Array) -> jax.Array:
        # On a TPU a gather of long rows becomes hundreds of passes over all of them.
        rows = [
            lax.dynamic_slice_in_dim(leaf, active[i], 1) for i in range(active.size)
        ]
        return jnp.concatenate(rows)

    return jax.tree.map(take, tree)


def put_rows(
    tree: Rows, rows: Rows, active: jax.Array, ready: jax.Array | None = None
) -> Rows:
    """Returns a tree, such as a state, with the rows of the active layers replaced.

    The counts of schedules are replaced in all rows. Unless `ready`, nothing is.

    Example:
      >>> put_rows(jnp.array([1, 2, 3]), jnp.array([8, 9]), jnp.array([0, 2]))
      Array([8, 2, 9], dtype=int32)
    """

    def put(leaf: jax.Array, rows: jax.Array) -> jax.Array:
        place, mode = active, "promise_in_bounds"
        if ready is not None:
            # Rows past the end are not written.
            past = leaf.shape[0] + jnp.arange(active.size, dtype=active.dtype)
            place, mode = jnp.where(ready, active, past), "drop"
        return leaf.at[place].set(
            rows,
            mode=mode,
            unique_indices=True,
            indices_are_sorted=True,
            out_sharding=_sharding(leaf),
        )

    def spread(leaf: jax.Array, rows: jax.Array) -> jax.Array:
        new = jnp.broadcast_to(rows[:1], leaf.shape)
        return new if ready is None else jnp.where(ready, new, leaf)

    return _map(put, spread, tree, rows)


def where(is_on: jax.Array, new: Rows, old: Rows) -> Rows:
    """Returns the new state if a layer is on, else the old with schedules advanced."""
    pick = lambda old, new: jnp.where(is_on, new, old)
    return _map(pick, lambda old, new: new, old, new)


def restart_rows(is_new: jax.Array, fresh: Rows, state: Rows) -> Rows:
    """Returns a state whose rows are fresh where `is_new`, schedules excepted."""

    def pick(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return _map(pick, lambda old, new: old, state, fresh)


def row_norms(rows: optax.Params, num_rows: int) -> jax.Array:
    """Returns the norm of every row of a tree, shape=(num_rows,), float32."""
    squares = [
        jnp.sum(jnp.square(leaf).reshape(num_rows, -1), axis=1)
        for leaf in jax.tree.leaves(rows)
    ]
    return jnp.sqrt(sum(squares, jnp.zeros(num_rows, jnp.float32)))


def _sharding(leaf: jax.Array) -> jax.NamedSharding | None:
    """Returns the sharding of rows over explicit mesh axes, None for others."""
    sharding = jax.typeof(leaf).sharding
    if not any(sharding.spec):
        return None
    return sharding.update(spec=jax.P(None, *sharding.spec[1:]))


def _map(function: _OnLeaf, shared: _OnLeaf, tree: Rows, other: Rows) -> Rows:
    """Maps one function over what belongs to a layer, and one over schedules."""

    def visit(node: Any, other: Any) -> Any:
        if isinstance(node, _SCHEDULES):
            return jax.tree.map(shared, node, other)
        if isinstance(node, _INJECTED):
            outside = [x._replace(inner_state=()) for x in (node, other)]
            inner = _map(function, shared, node.inner_state, other.inner_state)
            return jax.tree.map(shared, *outside)._replace(inner_state=inner)
        return function(node, other)

    is_leaf = lambda node: isinstance(node, _SCHEDULES + _INJECTED)
    return jax.tree.map(visit, tree, other, is_leaf=is_leaf)
