"""The optimiser of every run: AdamW, warm-up and linear decay, a clipped norm."""

import jax
import jax.numpy as jnp
import optax

__all__ = ["MAX_NORM", "learning_rate_at", "make_optimizer"]

WARM_UP = 0.06  # fraction of the updates, as for RoBERTa on GLUE
MAX_NORM = 1.0  # global norm of the gradient of the trained values


def learning_rate_at(
    count: jax.typing.ArrayLike, peak: float, updates: int
) -> jax.Array:
    """Returns the learning rate of an update.

        peak * min((count + 1) / warm_up, (updates - count) / (updates - warm_up + 1))

    No update has a rate of zero, neither the first nor the last.

    Args:
      count: updates made before.
      peak: the largest rate, reached after 6 % of the updates.
      updates: updates of the whole run.

    Example:
      >>> [round(float(learning_rate_at(count, 1.0, 4)), 2) for count in range(4)]
      [1.0, 0.75, 0.5, 0.25]
    """
    warm_up = max(1, round(WARM_UP * updates))
    count = jnp.asarray(count, jnp.float32)
    rise = (count + 1) / warm_up
    return peak * jnp.minimum(rise, (updates - count) / (updates - warm_up + 1))


def make_optimizer(peak: float, updates: int) -> optax.GradientTransformation:
    """Returns the optimiser of a run of so many updates, which does not clip."""
    schedule = lambda count: learning_rate_at(count, peak, updates)
    return optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
