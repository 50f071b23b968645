"""Gradients of a loss over all examples: in parts, over replicas, and if finite."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.params.axes import inside_replicas

__all__ = ["Values", "as_types", "choose_if", "summed_gradients", "update_if"]

Values = TypeVar("Values", bound=optax.Params)
Kept = TypeVar("Kept")
# (values, batch, key) -> (sum of the losses, number they are averaged by)
Total = Callable[..., tuple[jax.Array, jax.Array]]
# ((loss, weight), gradients of the loss), all of them sums
Sums = tuple[tuple[jax.Array, jax.Array], Values]


def summed_gradients(
    total: Total,
    values: Values,
    batch: object,
    key: jax.Array,
    *,
    accumulate: int = 1,
    data_axes: tuple[str, ...] = (),
) -> Sums[Values]:
    """Returns loss and weight, and the gradient of the loss, summed over a batch.

    Args:
      total: what is differentiated, with respect to its first argument.
      values: tree of arrays.
      batch: leaves `[B, ...]`, or `[accumulate, B / accumulate, ...]`.
      key: for dropout; micro-batches and replicas have keys of their own.
      accumulate: micro-batches, one after the other.
      data_axes: mesh axes over which replicas see different examples.

    Example:
      >>> total = lambda w, x, key: (jnp.sum(w * x), jnp.float32(x.size))
      >>> key = jax.random.key(0)
      >>> summed_gradients(total, jnp.float32(2.0), jnp.array([1.0, 3.0]), key)
      ... # doctest: +NORMALIZE_WHITESPACE
      ((Array(8., dtype=float32), Array(2., dtype=float32)), Array(4., dtype=float32))
    """
    if data_axes:
        return _over_replicas(total, values, batch, key, accumulate, data_axes)
    return _in_parts(total, values, batch, key, accumulate)


def update_if(
    ready: jax.Array,
    tx: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    count: jax.typing.ArrayLike,
    values: Values,
    opt_state: optax.OptState,
    **extra_args: object,
) -> tuple[jax.Array, Values, optax.OptState]:
    """Returns count, values and state after an update if ready, else as they are."""

    def update(
        count: jax.typing.ArrayLike, values: Values, opt_state: optax.OptState
    ) -> tuple[jax.typing.ArrayLike, Values, optax.OptState]:
        updates, new_state = tx.update(grads, opt_state, values, **extra_args)
        new = (optax.safe_increment(count), optax.apply_updates(values, updates))
        return as_types((*new, new_state), (count, values, opt_state))

    # A choice between arrays would copy whole leaves that are trained (measured on a
    # CPU: 10 times the time of the update), a branch works in place.
    return lax.cond(ready, update, lambda *kept: kept, count, values, opt_state)


def choose_if(finite: jax.Array, new: object, old: Kept) -> Kept:
    """Returns the new arrays if a gradient was finite, else the old ones."""
    pick = lambda new, old: jnp.where(finite, new, old)
    return jax.tree.map(pick, as_types(new, old), old)


def as_types(new: object, old: Kept) -> Kept:
    """Returns arrays in the dtypes of others."""
    cast = lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype)
    return jax.tree.map(cast, new, old)


def _in_parts(
    total: Total, values: Values, batch: object, key: jax.Array, accumulate: int
) -> Sums[Values]:
    """Returns the sums over micro-batches."""
    differentiate = jax.value_and_grad(total, has_aux=True)
    if accumulate == 1:
        return differentiate(values, batch, key)
    zeros = jax.tree.map(jnp.zeros_like, values)
    start = ((jnp.float32(0), jnp.float32(0)), zeros)

    def add(
        sums: Sums[Values], one: tuple[object, jax.Array]
    ) -> tuple[Sums[Values], None]:
        return jax.tree.map(jnp.add, sums, differentiate(values, *one)), None

    return lax.scan(add, start, (batch, jax.random.split(key, accumulate)))[0]


def _over_replicas(
    total: Total,
    values: Values,
    batch: object,
    key: jax.Array,
    accumulate: int,
    axes: tuple[str, ...],
) -> Sums[Values]:
    """Returns the sums over all replicas, each of which sees its own examples.

    Left to the compiler, replicas would add up the dense gradient of a weight before
    its tap sees it. Mapped over the replicas, the tap comes first, which is the same
    because gathering is linear, and what is added up is packed. (A `jax.shard_map`
    over these axes alone says the same, and aborts in XLA beside other axes.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = math.prod(mesh.shape[axis] for axis in axes)
    dim = int(accumulate > 1)

    def split(leaf: jax.Array) -> jax.Array:
        rows = leaf.shape[dim] // count
        return leaf.reshape(*leaf.shape[:dim], count, rows, *leaf.shape[dim + 1 :])

    def one(batch: object, number: jax.Array) -> Sums[Values]:
        own = jax.random.fold_in(key, number)
        return _in_parts(total, values, batch, own, accumulate)

    with inside_replicas(axes):
        mapped = jax.vmap(one, in_axes=(dim, 0), spmd_axis_name=axes)
        sums = mapped(jax.tree.map(split, batch), jnp.arange(count))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)
