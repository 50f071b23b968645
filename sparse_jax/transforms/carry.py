"""Carrying optimiser state from one support to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax.params.roles import DENSE, TRAINED, Role, map_roles
from sparse_jax.supports.lanes import LaneSupport

__all__ = ["carry_state", "carry_values"]


class _Origin(NamedTuple):
    """For each new position: its place in the old support, and whether it has one."""

    place: jax.Array
    stays: jax.Array
    axis: int  # along which places count


class _Moving:
    """A leaf of the state with the origin of its entries; itself a leaf of a tree."""

    def __init__(self, leaf: Any, origin: _Origin | None):
        self.leaf = leaf
        self.origin = origin


def carry_state(
    inner: optax.GradientTransformation,
    roles: Any,
    state: optax.OptState,
    fresh: optax.OptState,
    old_support: Any,
    new_support: Any,
) -> optax.OptState:
    """Returns the state of `inner` for a new support.

    Entries in both supports keep their values, new entries take those of `fresh`, and
    what does not belong to an entry (counts, hyperparameters) is kept.

    Args:
      inner: the transformation whose state it is.
      roles: role of every leaf.
      state: its state at the old support.
      fresh: its state as initialised at the new support.
      old_support: positions or rows of groups, per sparse leaf.
      new_support: the same for the new support.
    """

    origins = _origins(roles, old_support, new_support)
    moving = optax.tree.map_params(
        inner, lambda leaf, box: _Moving(leaf, box.origin), state, origins
    )
    return jax.tree.map(_carry, moving, fresh)


def carry_values(
    roles: Any, values: Any, fresh: Any, old_support: Any, new_support: Any
) -> Any:
    """Returns packed values for a new support: kept where it can be, else `fresh`.

    Leaves of `values` that are `optax.MaskedNode()` take those of `fresh`.
    """
    origins = _origins(roles, old_support, new_support)

    def carry(role: Role, value: Any, fresh: Any, box: Any) -> Any:
        if isinstance(value, optax.MaskedNode):
            return fresh
        return _carry(_Moving(value, box.origin), fresh)

    return map_roles(carry, roles, values, fresh, origins, only=TRAINED)


def _origins(roles: Any, old_support: Any, new_support: Any) -> Any:
    """Returns a tree of boxed origins, one for each trained leaf."""

    def origin(role: Role, old: Any, new: Any) -> _Moving:
        return _Moving(None, None if role.kind == DENSE else _find(old, new))

    return map_roles(origin, roles, old_support, new_support, only=TRAINED)


def _find(old: Any, new: Any) -> _Origin:
    """Finds the entries of one support in another."""
    if isinstance(old, LaneSupport):
        return _find_rows(old.positions, new.positions)
    search = jnp.searchsorted if old.ndim == 1 else jax.vmap(jnp.searchsorted)
    place = jnp.minimum(search(old, new), old.shape[-1] - 1)
    return _Origin(place, jnp.take_along_axis(old, place, axis=-1) == new, -1)


def _find_rows(old: jax.Array, new: jax.Array) -> _Origin:
    """Finds the rows of groups in those of before, shape=(..., m, G, C)."""
    axis = -3

    def look(i: jax.Array, place: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(old, i, axis)
        return jnp.where(new == one, jnp.int32(i), place)

    nowhere = jnp.full(new.shape, -1, jnp.int32)
    place = jax.lax.fori_loop(0, old.shape[axis], look, nowhere)
    return _Origin(jnp.maximum(place, 0), place >= 0, axis)


def _carry(leaf: Any, fresh: Any) -> Any:
    """Returns one leaf of the new state."""
    if not isinstance(leaf, _Moving):
        return leaf
    if leaf.origin is None or leaf.leaf.shape != leaf.origin.place.shape:
        return leaf.leaf
    origin = leaf.origin
    kept = jnp.take_along_axis(leaf.leaf, origin.place, axis=origin.axis)
    return jnp.where(origin.stays, kept, fresh)
