"""The released PyTorch SIFT, update by update, delays and all."""

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from sparse_jax.params.arguments import require_one_device_view
from sparse_jax.params.names import Rule, Tree
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.packing import unpack
from sparse_jax.supports.roles import (
    DENSE,
    SPARSE,
    TRAINED,
    Role,
    Roles,
    is_role,
    map_roles,
    roles_of,
)
from sparse_jax.supports.scores import SCORES

__all__ = ["TorchSiftState", "torch_sift"]


class TorchSiftState(NamedTuple):
    """State of `torch_sift`. Leaves not concerned hold `optax.MaskedNode()`."""

    count: jax.typing.ArrayLike  # shape=(), int32: gradients seen
    support: optax.Updates  # sparse leaves: shape=(k,) or (L, k), int32
    increment: optax.Updates  # sparse leaves: the step that is not merged yet
    held: optax.Updates  # late leaf: packed gradient of the batch before
    inner_state: optax.OptState  # of all trained leaves but the late one
    late_state: optax.OptState  # of the late leaf


def torch_sift(
    inner: optax.GradientTransformation,
    density: float | Fraction,
    *,
    where: Rule | None = None,
    dense: Rule | None = None,
    stacked: Rule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Reproduces the released SIFT with accumulation 1, as `sift(compat=...)`.

    With g_t the gradient of batch t and S the k = min(int(density * n) + 1, n)
    positions of largest |g_0|,

        w_{t+1}[S] = w_t[S] + u_{t-1},   u_t = inner(g_t[S]) for t >= 1,  u_0 = 0.

    That is: the first batch only selects, though the optimizer counts a step on zero
    gradients; every increment is merged one update late, and the last one never; the
    late leaf (the first sparse leaf of the tree, the last that a backward pass
    reaches) lags one more batch and skips its second step. Decay acts on an increment
    of zero, so it has no effect. The packed values have the dtype of the parameters.

    Differs from the released code: nothing that its weights show; the late leaf is
    the first in the order of the tree, so name or nest the leaves in forward order.

    Args:
      inner: transformation of the packed gradients, such as `optax.adamw(1e-4)`.
      density: the original's `sparse_rate`.
      where: expressions of the sparse leaves, as in `sift`.
      dense: expressions of the "exceptions", trained in full and without delay.
      stacked: expressions of the leaves whose first axis counts layers.

    References:
      `sift/sift.py` of the released code of Song et al., 2024, at commit 5bef8a06.
    """
    inner = optax.with_extra_args_support(inner)

    def roles_and_late(tree: optax.Params) -> tuple[Roles, Tree[bool]]:
        roles = roles_of(tree, where=where, dense=dense, stacked=stacked)
        flags = jax.tree.leaves(roles, is_leaf=is_role)
        sparse = [role.name for role in flags if role.kind == SPARSE]
        late = sparse[0] if sparse else None
        return roles, map_roles(lambda role: role.name == late, roles)

    def init_fn(params: optax.Params) -> TorchSiftState:
        roles, late = roles_and_late(params)

        def packed(
            role: Role, leaf: jax.Array, dtype: DTypeLike | None = None
        ) -> jax.Array:
            if role.kind == DENSE:
                return jnp.zeros_like(leaf)
            k = _original_size(density, role.size)
            return jnp.zeros(role.packed_shape(leaf.shape, k), dtype or leaf.dtype)

        positions = lambda role, leaf: packed(role, leaf, jnp.int32)
        increment = map_roles(packed, roles, params, only=(SPARSE,))
        values = map_roles(packed, roles, params, only=TRAINED)
        return TorchSiftState(
            count=jnp.zeros([], jnp.int32),
            support=map_roles(positions, roles, params, only=(SPARSE,)),
            increment=increment,
            held=_keep(late, increment),
            inner_state=inner.init(_drop(late, values)),
            late_state=inner.init(_keep(late, values)),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, TorchSiftState]:
        require_one_device_view("updates", updates)
        roles, late = roles_and_late(updates)
        count = jnp.asarray(state.count)
        support = lax.cond(
            count == 0, lambda: _select(roles, updates, density), lambda: state.support
        )

        # The original's parameter is the increment, which is zero when the optimizer
        # looks at it: this is why its weight decay does nothing.
        def value(role: Role, update: jax.Array, param: jax.Array) -> jax.Array:
            return jnp.zeros_like(update) if role.kind == SPARSE else param

        grads = map_roles(Role.read, roles, updates, support, only=TRAINED)
        if params is None:
            params = updates
        values = map_roles(value, roles, grads, params, only=TRAINED)

        # Step 0 of the sparse leaves is the counted no-op on a zero gradient.
        silence = lambda role, grad: jnp.where(
            (role.kind == SPARSE) & (count == 0), jnp.zeros_like(grad), grad
        )
        used = map_roles(silence, roles, grads, only=TRAINED)
        step, inner_state = inner.update(
            _drop(late, used), state.inner_state, _drop(late, values), **extra_args
        )

        def step_late() -> tuple[optax.Updates, optax.OptState]:
            return inner.update(
                state.held, state.late_state, _keep(late, values), **extra_args
            )

        nothing = jax.tree.map(jnp.zeros_like, state.held)
        late_step, late_state = lax.cond(
            count == 1, lambda: (nothing, state.late_state), step_late
        )
        step = jax.tree.map(
            lambda is_late, step, late_step: late_step if is_late else step,
            late, step, late_step,
        )  # fmt: skip
        merged = map_roles(
            lambda role, step, old: old if role.kind == SPARSE else step,
            roles, step, state.increment, only=TRAINED,
        )  # fmt: skip
        # `held` stays zero until the batch after the selection has been seen, so the
        # late leaf's first step is the counted no-op too.
        held = _keep(late, map_roles(lambda role, g: g, roles, grads, only=(SPARSE,)))
        return unpack(roles, support, updates, merged), TorchSiftState(
            count=optax.safe_increment(state.count),
            support=support,
            increment=map_roles(lambda role, s: s, roles, step, only=(SPARSE,)),
            held=jax.tree.map(
                lambda new: jnp.where(count == 0, jnp.zeros_like(new), new), held
            ),
            inner_state=inner_state,
            late_state=late_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _original_size(density: float | Fraction, size: int) -> int:
    """Returns the original's number of entries, one above what its rate says."""
    return min(int(density * size) + 1, size)


def _keep(late: Tree[bool], tree: optax.Params) -> optax.Params:
    """Masks all leaves but the late one."""
    return jax.tree.map(
        lambda is_late, leaf: leaf if is_late else optax.MaskedNode(), late, tree
    )


def _drop(late: Tree[bool], tree: optax.Params) -> optax.Params:
    """Masks the late leaf."""
    return jax.tree.map(
        lambda is_late, leaf: optax.MaskedNode() if is_late else leaf, late, tree
    )


def _select(
    roles: Roles, updates: optax.Updates, density: float | Fraction
) -> optax.Params:
    """Returns the support of every sparse leaf."""

    def select_leaf(role: Role, leaf: jax.Array) -> jax.Array:
        k = _original_size(density, role.size)
        unused = jax.random.key(0)
        chosen = (leaf, leaf, k, unused)
        return ENTRY.choose(SCORES["gradient"], *chosen, stacked=role.stacked)[0]

    return map_roles(select_leaf, roles, updates, only=(SPARSE,))
