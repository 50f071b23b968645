"""The optimizer of every run: AdamW, warm-up and linear decay, a clipped norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.errors import InputError
from sparse_jax.training.settings import WARM_UP

__all__ = ["MAX_NORM", "Schedule", "learning_rate_at", "make_optimizer", "schedule_of"]

MAX_NORM = 1.0  # global norm of the gradient of the trained values


class Schedule(NamedTuple):
    """The numbers of a schedule, float32: arguments of the compiled update.

    As constants of the program they would make it another one for every learning rate.
    """

    peak: jax.typing.ArrayLike
    updates: jax.typing.ArrayLike
    rise: jax.typing.ArrayLike  # 1 / updates of the warm-up
    fall: jax.typing.ArrayLike  # 1 / (updates after it + 1)


def schedule_of(peak: float, updates: int, warmup: float = WARM_UP) -> Schedule:
    """Returns the schedule of a run.

    Args:
      peak: the largest rate, reached after the warm-up.
      updates: updates of the whole run.
      warmup: a fraction of the updates, or from 1 on their number; the least is one.

    Raises:
      InputError: if the warm-up is longer than the run.
    """
    warm_up = max(1, round(warmup * updates if warmup < 1 else warmup))
    if warm_up > updates:
        raise InputError(
            f"`warmup` must be at most {updates}, the updates of the run, got "
            f"{warm_up}. A fraction, such as {WARM_UP}, fits every run."
        )
    one = np.float32(1)
    return Schedule(
        peak=np.float32(peak),
        updates=np.float32(updates),
        # Compilers multiply by the inverse of a constant, and so gives the same bits.
        rise=one / np.float32(warm_up),
        fall=one / np.float32(updates - warm_up + 1),
    )


def learning_rate_at(count: jax.typing.ArrayLike, schedule: Schedule) -> jax.Array:
    """Returns the learning rate of an update.

        peak * min((count + 1) / warm_up, (updates - count) / (updates - warm_up + 1))

    No update has a rate of zero, neither the first nor the last.

    Args:
      count: updates made before.
      schedule: as from `schedule_of`.

    Example:
      >>> schedule = schedule_of(1.0, 4)
      >>> [round(float(learning_rate_at(count, schedule)), 2) for count in range(4)]
      [1.0, 0.75, 0.5, 0.25]
    """
    count = jnp.asarray(count, jnp.float32)
    peak, updates, rise, fall = map(jnp.asarray, schedule)
    return peak * jnp.minimum((count + 1) * rise, (updates - count) * fall)


def make_optimizer() -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run, which does not clip.

    Its `update` takes the `schedule` as an extra argument.
    """
    start = lambda params: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))
    scale: Any = _scale
    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        # Decays nothing; checkpoints have its place in the state.
        optax.add_decayed_weights(0.0),
        optax.GradientTransformationExtraArgs(start, scale),
    )


def _scale(
    updates: optax.Updates,
    state: optax.ScaleByScheduleState,
    params: optax.Params | None = None,
    *,
    schedule: Schedule,
    **extra_args: object,
) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
    """Returns steps against the updates, of the length that the schedule says."""
    del params, extra_args
    rate = -learning_rate_at(state.count, schedule)
    steps = jax.tree.map(lambda update: rate.astype(update.dtype) * update, updates)
    count: Any = optax.safe_increment(state.count)
    return steps, optax.ScaleByScheduleState(count=count)
