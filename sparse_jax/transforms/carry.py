"""Carrying optimizer state from one support to the next."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from sparse_jax.params.names import Tree
from sparse_jax.supports.layout import Origin
from sparse_jax.supports.roles import DENSE, TRAINED, Role, Roles, map_roles

__all__ = ["carry_state", "carry_values"]


@dataclass(frozen=True)
class _Moving:
    """A leaf of the state with the origin of its entries; itself a leaf of a tree."""

    leaf: jax.Array
    origin: Origin | None


@dataclass(frozen=True)
class _Box:
    """The origin of the entries of a trained leaf, None if it is dense; a leaf too."""

    origin: Origin | None


def carry_state(
    inner: optax.GradientTransformation,
    roles: Roles,
    state: optax.OptState,
    fresh: optax.OptState,
    old_support: optax.Params,
    new_support: optax.Params,
) -> optax.OptState:
    """Returns the state of `inner` for a new support.

    Entries in both supports keep their values, new entries take those of `fresh`, and
    what does not belong to an entry (counts, hyperparameters) is kept.

    Args:
      inner: the transformation whose state it is.
      roles: role of every leaf.
      state: its state at the old support.
      fresh: its state as initialized at the new support.
      old_support: positions or rows of groups, per sparse leaf.
      new_support: the same for the new support.
    """
    origins = _origins(roles, old_support, new_support)
    moving = optax.tree.map_params(
        inner, lambda leaf, box: _Moving(leaf, box.origin), state, origins
    )
    return jax.tree.map(_carry, moving, fresh)


def carry_values(
    roles: Roles,
    values: optax.Params,
    fresh: optax.Params,
    old_support: optax.Params,
    new_support: optax.Params,
) -> optax.Params:
    """Returns packed values for a new support: kept where it can be, else `fresh`.

    Leaves of `values` that are `optax.MaskedNode()` take those of `fresh`.
    """
    origins = _origins(roles, old_support, new_support)

    def carry(
        role: Role, value: jax.Array | optax.MaskedNode, fresh: jax.Array, box: _Box
    ) -> jax.Array:
        if isinstance(value, optax.MaskedNode):
            return fresh
        return _carry(_Moving(value, box.origin), fresh)

    return map_roles(carry, roles, values, fresh, origins, only=TRAINED)


def _origins(
    roles: Roles, old_support: optax.Params, new_support: optax.Params
) -> Tree[_Box]:
    """Returns the origins of the entries of every trained leaf."""

    def origin(role: Role, old: jax.Array, new: jax.Array) -> _Box:
        return _Box(None if role.kind == DENSE else role.layout.origins(old, new))

    return map_roles(origin, roles, old_support, new_support, only=TRAINED)


def _carry(leaf: jax.Array | _Moving, fresh: jax.Array) -> jax.Array:
    """Returns one leaf of the new state."""
    if not isinstance(leaf, _Moving):
        return leaf
    if leaf.origin is None or leaf.leaf.shape != leaf.origin.place.shape:
        return leaf.leaf
    origin = leaf.origin
    kept = jnp.take_along_axis(leaf.leaf, origin.place, axis=origin.axis)
    return jnp.where(origin.stays, kept, fresh)
