"""Clipping by the norm of the update before, for updates of one layer at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax.params.positive import require_positive

__all__ = ["PreviousNormState", "clip_by_previous_norm"]


class PreviousNormState(NamedTuple):
    """State of `clip_by_previous_norm`."""

    previous_norm: jax.typing.ArrayLike  # shape=(), float32; 0 before the first update


def clip_by_previous_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Clips gradients by the global norm of the previous update's gradient.

        g_t <- g_t * min(1, max_norm / ||g_(t-1)||)

    Like `optax.clip_by_global_norm`, but the scale does not depend on g_t, so that
    `InBackward` can update one layer at a time. The first update is not clipped: Adam's
    does not depend on the scale of its gradient. A single large gradient passes
    unclipped, and the one after it is scaled down instead.

    Args:
      max_norm: largest norm of a gradient like the last one.

    Returns:
      A transformation whose `update` takes `global_norm`, a float32 scalar, from a
      caller who gives it a part of the gradients only; without it the norm is taken of
      what `update` gets. A norm that is not finite is forgotten, so that it spoils no
      later update.

    Raises:
      InputError: if `max_norm` is not positive and finite.

    Example:
      >>> tx = clip_by_previous_norm(5.0)
      >>> grads = {"w": jnp.array([6.0, 8.0])}
      >>> state = tx.init(grads)
      >>> first, state = tx.update(grads, state)
      >>> second, state = tx.update(grads, state)
      >>> first["w"], second["w"]
      (Array([6., 8.], dtype=float32), Array([3., 4.], dtype=float32))
    """

    require_positive("max_norm", max_norm, "Leave the transformation out not to clip.")

    def init_fn(params: optax.Params) -> PreviousNormState:
        del params
        return PreviousNormState(jnp.zeros([], jnp.float32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        global_norm: jax.Array | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, PreviousNormState]:
        del params, extra_args
        before = jnp.maximum(state.previous_norm, max_norm)
        scale = lambda g: g * (max_norm / before).astype(g.dtype)
        clipped = jax.tree.map(scale, updates)
        norm = optax.tree.norm(updates) if global_norm is None else global_norm
        kept = jnp.where(jnp.isfinite(norm), norm, state.previous_norm)
        return clipped, PreviousNormState(jnp.asarray(kept, jnp.float32))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
