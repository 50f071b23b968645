"""Packing: trees of trained values, and the parameters they came from.

A packed tree has the structure of the parameters: float32 values at the support of a
sparse leaf, the whole array of a dense leaf, `optax.MaskedNode()` for a frozen one.
Only values of float64 leaves are float64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.supports.roles import DENSE, SPARSE, TRAINED, Role, Roles, map_roles

__all__ = [
    "below_float32",
    "pack",
    "rounded_step",
    "route",
    "unpack",
    "value_dtype",
    "write_back",
    "zeros_like",
]


def below_float32(leaf: jax.Array) -> bool:
    """Returns whether a leaf is too coarse for small updates (bfloat16, float16)."""
    return jnp.dtype(leaf.dtype).itemsize < 4


def value_dtype(leaf: jax.Array) -> np.dtype:
    """Returns the dtype of the trained values of a leaf: float32, or its float64."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def pack(roles: Roles, support: optax.Params, tree: optax.Params) -> optax.Params:
    """Returns the trained values of a tree shaped like the parameters."""
    read = lambda role, leaf, support: role.read(leaf, support).astype(
        value_dtype(leaf)
    )
    return map_roles(read, roles, tree, support, only=TRAINED)


def unpack(
    roles: Roles, support: optax.Params, like: optax.Params, packed: optax.Params
) -> optax.Params:
    """Returns packed values in the shapes and dtypes of `like`, zero elsewhere."""
    blank = lambda role, leaf: leaf if role.kind == DENSE else _zeros(leaf)
    return write_back(roles, map_roles(blank, roles, like), support, packed)


def route(
    roles: Roles,
    params: optax.Params,
    tap_leaf: Callable[..., jax.Array],
    *trees: object,
) -> tuple[optax.Params, tuple[optax.Params, ...]]:
    """Puts dense values and taps into the parameters, and splits off the stack's.

    Returns the parameters for the forward pass and, for every tree, its sparse
    leaves that are stacked: these are tapped inside the stack, one layer at a time.
    """

    def place(
        role: Role, leaf: jax.Array, *values: jax.Array | optax.MaskedNode
    ) -> jax.Array:
        if role.kind == DENSE and not isinstance(values[0], optax.MaskedNode):
            return values[0].astype(leaf.dtype)
        if role.kind == SPARSE and not role.stacked:
            return tap_leaf(role, leaf, *values)
        return leaf

    inside = lambda role, value: value if role.stacked else optax.MaskedNode()
    placed = map_roles(place, roles, params, *trees)
    return placed, tuple(map_roles(inside, roles, t, only=(SPARSE,)) for t in trees)


def write_back(
    roles: Roles, params: optax.Params, support: optax.Params, leaves: optax.Params
) -> optax.Params:
    """Writes the trained values into the parameters, in place if these are donated."""
    return map_roles(Role.write, roles, params, support, leaves)


def rounded_step(
    roles: Roles,
    support: optax.Params,
    step: optax.Updates,
    values: optax.Params,
    params: optax.Params,
) -> optax.Updates:
    """Returns the step that takes a coarse parameter to its rounded master."""
    before = pack(roles, support, params)
    rounded = lambda role, step, value, before, leaf: (
        value.astype(leaf.dtype).astype(jnp.float32) - before
        if below_float32(leaf)
        else step
    )
    return map_roles(rounded, roles, step, values, before, params, only=TRAINED)


def zeros_like(tree: optax.Updates) -> optax.Updates:
    """Returns zeros in the shapes and dtypes of a tree of gradients."""
    return jax.tree.map(_zeros, tree)


def _zeros(leaf: jax.Array) -> jax.Array:
    """Returns zeros like a leaf; a gradient of integers (float0) is zero already."""
    return leaf if leaf.dtype == jax.dtypes.float0 else jnp.zeros_like(leaf)
