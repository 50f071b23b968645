"""Granularity: the layouts that a method can be asked for, by a word or as they are."""

import jax

from sparse_jax.errors import InputError
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.lanes import LANE
from sparse_jax.supports.layout import Layout

__all__ = [
    "ENTRY",
    "GRANULARITIES",
    "LANE",
    "gather",
    "granularity_named",
    "scatter",
]

# The words of the library and of the command line.
GRANULARITIES: dict[str, Layout] = {"entry": ENTRY, "lane": LANE}


def granularity_named(granularity: str | Layout) -> Layout:
    """Returns the layout that a word names; layouts pass through.

    Raises:
      InputError: if it is neither.

    Example:
      >>> granularity_named("lane") is LANE
      True
    """
    if isinstance(granularity, Layout):
        return granularity
    if not isinstance(granularity, str) or granularity not in GRANULARITIES:
        words = ", ".join(map(repr, GRANULARITIES))
        raise InputError(
            f"`granularity` must be one of {words} or a `Layout`, got {granularity!r}."
        )
    return GRANULARITIES[granularity]


def gather(
    x: jax.Array,
    support: jax.Array,
    layers: jax.Array | None = None,
    *,
    granularity: str | Layout = "entry",
) -> jax.Array:
    """Returns the entries of an array at a support, in the dtype of the array.

        packed[i] = x[support[i]]

    Args:
      x: array of any shape, or a stack of layers, shape=(L, ...).
      support: positions, shape=(k,), or (L, k) for a stack; int32. Of lanes, rows of
        groups, shape=(m, G, C) or (L, m, G, C), uint8.
      layers: numbers of some layers of a stack, shape=(n,), int32; then the support
        is theirs, shape=(n, k). None means all.
      granularity: what the support counts, as in `sift`.

    Returns:
      The entries, in the shape of `support`.

    Example:
      >>> import jax.numpy as jnp
      >>> gather(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0, 3]))
      Array([1., 4.], dtype=float32)
    """
    return granularity_named(granularity).gather(x, support, layers)


def scatter(
    x: jax.Array,
    support: jax.Array,
    packed: jax.Array,
    layers: jax.Array | None = None,
    *,
    granularity: str | Layout = "entry",
) -> jax.Array:
    """Returns an array with the entries at a support replaced.

        x[support[i]] = packed[i]

    Setting, not adding: a low-precision array then holds the rounded value of its
    float32 master, however small the last update was. Under `jit` with `x` donated,
    it happens in place.

    Args:
      x, support, layers, granularity: as for `gather`; other layers stay as they are.
      packed: values in the shape of `support`; cast to the dtype of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> scatter(jnp.zeros((2, 2)), jnp.array([0, 3]), jnp.array([1.0, 4.0]))
      Array([[1., 0.],
             [0., 4.]], dtype=float32)
    """
    return granularity_named(granularity).scatter(x, support, packed, layers)
