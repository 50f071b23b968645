"""Running sums and maxima of long vectors, in programs that compile in seconds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["cummax", "cumsum", "running"]

# Elements of a row, as many as a vector register of a TPU has lanes.
_ROW = 128


def cumsum(x: jax.Array) -> jax.Array:
    """Returns y[i] = x[0] + ... + x[i].

    Args:
      x: shape=(n,), int32.

    Example:
      >>> cumsum(jnp.array([1, 0, 2]))
      Array([1, 1, 3], dtype=int32)
    """
    by_rows = lambda x: running(jnp.sum, jnp.add, 0, x)
    return lax.platform_dependent(x, tpu=by_rows, default=lax.cumsum)


def cummax(x: jax.Array) -> jax.Array:
    """Returns y[i] = max(x[0], ..., x[i]).

    Args:
      x: shape=(n,), int32, not negative.

    Example:
      >>> cummax(jnp.array([1, 0, 2]))
      Array([1, 1, 2], dtype=int32)
    """
    by_rows = lambda x: running(jnp.max, jnp.maximum, 0, x)
    return lax.platform_dependent(x, tpu=by_rows, default=lax.cummax)


def running(
    reduce: Callable[..., jax.Array],
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    neutral: int,
    x: jax.Array,
) -> jax.Array:
    """Returns y[i] = reduce(x[: i + 1]), row by row.

    Within rows each element reduces all that are before it, 128 times the work, and the
    last of them run in the same way. The compiler of TPUs takes 86 s for `lax.cumsum`
    and 135 s for `lax.cummax` of 839,000 numbers (5 % of a matrix of 4096 x 4096), and
    less than 5 s for this, which takes 0.3 ms by its cycles.

    Args:
      reduce: along an axis.
      combine: of two arrays.
      neutral: what changes nothing.
      x: shape=(n,).

    Example:
      >>> running(jnp.sum, jnp.add, 0, jnp.ones(300, jnp.int32))[-1]
      Array(300, dtype=int32)
    """
    rows = jnp.pad(x, (0, -x.size % _ROW), constant_values=neutral).reshape(-1, _ROW)
    # [1, i, j]: whether j is at i or before it.
    is_before = jnp.tri(_ROW, dtype=bool)[None]
    within = reduce(jnp.where(is_before, rows[:, None, :], neutral), axis=2)
    within = within.astype(x.dtype)  # sums of int32 are int64 where JAX has it
    if len(rows) > 1:
        ends = running(reduce, combine, neutral, within[:, -1])
        before = jnp.pad(ends[:-1], (1, 0), constant_values=neutral)
        within = combine(within, before[:, None])
    return within.reshape(-1)[: x.size]
