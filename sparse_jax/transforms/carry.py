"""Carrying optimizer state from one support to the next."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from sparse_jax.params.names import Tree
from sparse_jax.supports.layout import Origin
from sparse_jax.supports.roles import DENSE, TRAINED, Role, Roles, map_roles
from sparse_jax.transforms.adam_8bit import decoded, encoded

__all__ = ["Box", "carry_state", "carry_values", "origins_of"]


@dataclass(frozen=True)
class _Moving:
    """A leaf of the state with the origin of its entries; itself a leaf of a tree."""

    leaf: jax.Array
    origin: Origin | None


@dataclass(frozen=True)
class Box:
    """The origin of the entries of a trained leaf, None if it is dense; a leaf too."""

    origin: Origin | None


def carry_state(
    inner: optax.GradientTransformation,
    origins: Tree[Box],
    state: optax.OptState,
    fresh: optax.OptState,
) -> optax.OptState:
    """Returns the state of `inner` for a new support.

    Entries in both supports keep their values, new entries take those of `fresh`, and
    what does not belong to an entry (counts, hyperparameters) is kept.

    Args:
      inner: the transformation whose state it is.
      origins: of the entries of what it was initialized with, as of `origins_of`.
      state: its state at the old support.
      fresh: its state as initialized at the new support.
    """
    # Codes mean nothing in another block.
    moving = optax.tree.map_params(
        inner, lambda leaf, box: _Moving(leaf, box.origin), decoded(state), origins
    )
    return encoded(jax.tree.map(_carry, moving, decoded(fresh)), fresh)


def carry_values(
    roles: Roles,
    origins: Tree[Box],
    values: optax.Params,
    fresh: optax.Params,
) -> optax.Params:
    """Returns packed values for a new support: kept where it can be, else `fresh`.

    Leaves of `values` that are `optax.MaskedNode()` take those of `fresh`.
    """

    def carry(
        role: Role, value: jax.Array | optax.MaskedNode, fresh: jax.Array, box: Box
    ) -> jax.Array:
        if isinstance(value, optax.MaskedNode):
            return fresh
        return _carry(_Moving(value, box.origin), fresh)

    return map_roles(carry, roles, values, fresh, origins, only=TRAINED)


def origins_of(
    roles: Roles, old_support: optax.Params, new_support: optax.Params
) -> Tree[Box]:
    """Returns the origins of the entries of every trained leaf.

    Args:
      roles: role of every leaf.
      old_support: positions or rows of groups, per sparse leaf.
      new_support: the same for the new support.
    """

    def origin(role: Role, old: jax.Array, new: jax.Array) -> Box:
        if role.kind == DENSE:
            return Box(None)
        return Box(role.layout.origins(old, new, role.shape))

    return map_roles(origin, roles, old_support, new_support, only=TRAINED)


def _carry(leaf: jax.Array | _Moving, fresh: jax.Array) -> jax.Array:
    """Returns one leaf of the new state."""
    if not isinstance(leaf, _Moving):
        return leaf
    origin = leaf.origin
    if origin is None or leaf.leaf.shape[: origin.place.ndim] != origin.place.shape:
        return leaf.leaf
    # Behind the numbers there may be an axis of what each stands for.
    more = range(origin.place.ndim, leaf.leaf.ndim)
    place, stays = (jnp.expand_dims(x, tuple(more)) for x in origin[:2])
    axis = origin.axis % origin.place.ndim
    kept = jnp.take_along_axis(leaf.leaf, place, axis=axis)
    return jnp.where(stays, kept, fresh)
