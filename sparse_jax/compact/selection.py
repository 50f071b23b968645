"""Around a selection: the updates before it, and the next one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_jax.compact.compact import Compact, CompactState, Tuner
from sparse_jax.methods.method import Method
from sparse_jax.models.attachment import Added
from sparse_jax.supports.roles import FROZEN, SPARSE, Role, Roles, is_role
from sparse_jax.transforms.carry import Box, carry_state, carry_values, origins_of

__all__ = ["before_selection", "reselect"]


@dataclass(frozen=True, kw_only=True)
class _Unselected(Method):
    """A method that leaves its sparse leaves alone."""

    method: Method = field(default_factory=Method)

    def roles(self, params: optax.Params) -> Roles:
        """Returns the roles of the method, the sparse ones frozen."""

        def freeze(role: Role) -> Role:
            return role._replace(kind=FROZEN) if role.kind == SPARSE else role

        return jax.tree.map(freeze, self.method.roles(params), is_leaf=is_role)

    def added(self, params: optax.Params, key: jax.Array) -> Added:
        """Returns what the method adds."""
        return self.method.added(params, key)

    def response(self, *args: Any, **options: Any) -> jax.Array:
        """Returns the response of the method."""
        return self.method.response(*args, **options)


def before_selection(tuner: Tuner) -> Compact:
    """Returns the tuner of updates before a selection, which need no dense gradient.

    It trains what `tuner` trains except for the sparse leaves, all layers at once. The
    first gradients under a new head mostly correct an offset that all examples share;
    after some updates of the head, a selection reflects what distinguishes them.

    Args:
      tuner: whose `init` takes over the parameters of the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax import Sparse
      >>> def loss(params, x, key, attachment):
      ...     return (params["b"] + params["w"] @ x - 1) ** 2, 1.0
      >>> method = Sparse(density=0.5, dense="b", stack=None)
      >>> tuner = Compact(loss, method, optax.sgd(0.5))
      >>> first, x = before_selection(tuner), jnp.array([1.0, 0.0])
      >>> params = {"b": jnp.float32(0.0), "w": jnp.zeros(2)}
      >>> state = first.init(params, key := jax.random.key(0))
      >>> state, _ = first.step(state, x, key)
      >>> state.params
      {'b': Array(1., dtype=float32), 'w': Array([0., 0.], dtype=float32)}
      >>> state, finite = tuner.select(tuner.init(state.params, key), x, key)

    References:
      Kumar et al., 2022, train a head before all of a model to keep what it has
      learned: https://arxiv.org/abs/2202.10054
    """
    own = tuner.method
    method = _Unselected(method=own, dense=own.dense, stack=own.stack)
    placed = (tuner.accumulate, tuner.shards, tuner.data_axes, tuner.split_masters)
    return Compact(tuner.loss, method, tuner.whole_tx, *placed)


def reselect(
    tuner: Tuner,
    state: CompactState,
    batch: object,
    key: jax.Array,
    avoid: Mapping[str, jax.Array] | None = None,
) -> tuple[CompactState, jax.Array]:
    """Chooses the supports again, and carries the state of the optimizer over.

    As `sift` does with `reselect_every`: entries in both supports keep their moments
    and masters, new ones start fresh, and counts run on. Those that are left keep
    their values in the parameters, but are in no support: note the old one.

    Args:
      tuner: of all layers at once, whose leaves are whole on every device.
      state: after any number of steps.
      batch, key, avoid: as of `Compact.select`.

    Returns:
      The new state, and whether the gradient was finite: if not, the state is as
      before.

    Example:
      >>> from sparse_jax import Sparse
      >>> loss = lambda params, x, key, attachment: (params["w"] @ x, 1.0)
      >>> method = Sparse(density=0.5, stack=None)
      >>> tuner = Compact(loss, method, optax.sgd(0.1, momentum=0.9))
      >>> state = tuner.init({"w": jnp.zeros(4)}, key := jax.random.key(0))
      >>> x = jnp.array([3.0, 2.0, 1.0, 0.0])
      >>> state, _ = tuner.select(state, x, key)
      >>> state, _ = tuner.step(state, x, key)
      >>> state, _ = reselect(tuner, state, x[jnp.array([0, 2, 1, 3])], key)
      >>> state.support["w"], optax.tree.get(state.opt_state, "trace")["leaves"]["w"]
      (Array([0, 2], dtype=int32), Array([3., 0.], dtype=float32))
    """
    support, finite, _ = tuner.choose(state, batch, key, avoid)
    roles = tuner.roles(state.params)
    fresh = tuner.begin(state.params, support, state.added)
    origins = origins_of(roles, state.support, support)
    stays = jax.tree.map(lambda _: Box(None), state.added)
    both = {"added": stays, "leaves": origins}
    chosen = fresh._replace(
        count=state.count,
        masters=carry_values(roles, origins, state.masters, fresh.masters),
        opt_state=carry_state(tuner.tx, both, state.opt_state, fresh.opt_state),
    )
    pick = lambda new, old: jnp.where(finite, new, old)
    before = state._replace(params=())
    small = jax.tree.map(pick, chosen._replace(params=()), before)
    return small._replace(params=state.params), finite
