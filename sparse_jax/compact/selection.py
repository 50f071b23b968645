"""What comes before a selection: the gradients of several batches."""

import jax
import optax

from sparse_jax.compact.checks import require_groups, sums_of
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.models.attachment import Attachment, LayerValues
from sparse_jax.supports.packing import value_dtype
from sparse_jax.supports.roles import SPARSE, map_roles

__all__ = ["measure"]


def measure(
    tuner: Tuner,
    state: CompactState,
    batch: object,
    key: jax.Array,
    before: optax.Params | None = None,
) -> optax.Params:
    """Returns the gradients of the sparse leaves, summed over batches, for `select`.

    A selection by several batches holds a dense float32 array of every sparse leaf
    until it is made, where one by a single batch needs no dense gradient.

    Args:
      tuner: whose `select` takes the sum as its `statistic`.
      state: as returned by `init`.
      batch: with accumulation its first micro-batch counts.
      key: as for `step`.
      before: the sum over other batches, to add to; donate it.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax import Compact, Sparse
      >>> def loss(params, x, key, attachment):
      ...     return jnp.sum(params["w"] * x), 1.0
      >>> tuner = Compact(loss, Sparse(density=0.5, stack=None), optax.sgd(0.1))
      >>> state = tuner.init({"w": jnp.ones(2)}, key := jax.random.key(0))
      >>> one = measure(tuner, state, jnp.array([5.0, 4.0]), key)
      >>> both = measure(tuner, state, jnp.array([-5.0, 3.0]), key, one)
      >>> state, _ = tuner.select(state, None, key, statistic=both)
      >>> both["w"], state.support["w"]
      (Array([0., 7.], dtype=float32), Array([1], dtype=int32))
    """
    require_groups(batch, tuner.accumulate)
    roles, first = tuner.roles(state.params), tuner.first(batch, key)
    stack = tuner.method.stack
    attachment = Attachment(LayerValues(state.added), response=tuner.method.respond)

    def mean(leaves: optax.Params) -> jax.Array:
        put = lambda role, leaf, own: own if role.kind == SPARSE else leaf
        params = map_roles(put, roles, state.params, leaves)
        total, weight = sums_of(tuner.loss, stack, params, attachment, *first)
        return total / weight

    own = lambda role, leaf: leaf
    grads = jax.grad(mean)(map_roles(own, roles, state.params, only=(SPARSE,)))
    found = jax.tree.map(lambda grad: grad.astype(value_dtype(grad)), grads)
    return found if before is None else optax.tree.add(before, found)
