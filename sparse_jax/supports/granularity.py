"""Granularity: the layouts that a method can be asked for, by a word or as they are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_jax.errors import InputError
from sparse_jax.supports.blocks import Blocks
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.lanes import LANE
from sparse_jax.supports.layout import Layout
from sparse_jax.supports.short_entries import SHORT_ENTRY

__all__ = [
    "ENTRY",
    "GRANULARITIES",
    "LANE",
    "Blocks",
    "gather",
    "granularity_named",
    "scatter",
]

# The words of the library and of the command line.
GRANULARITIES: dict[str, Layout] = {
    "entry": ENTRY,
    "entry16": SHORT_ENTRY,
    "lane": LANE,
    # A channel of a kernel [in, out]: what an input does, and what an output sees.
    "row": Blocks(rows=1, columns=None),
    "column": Blocks(rows=None, columns=1),
    "4x4": Blocks(rows=4, columns=4),
    # As sparse matrix tuning does (SMT: He et al., 2025, arXiv 2405.15525).
    "256x256": Blocks(rows=256, columns=256),
}


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
      The entries, in the shape of `support`; of blocks with an axis behind it.

    Raises:
      InputError: if the support is not one of such an array, by its type and shape, or
        by its numbers where they are known.

    Example:
      >>> import jax.numpy as jnp
      >>> gather(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0, 3]))
      Array([1., 4.], dtype=float32)
    """
    layout = granularity_named(granularity)
    _require_support(layout, x, support, layers)
    return layout.gather(*jax.tree.map(jnp.asarray, (x, support, layers)))


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
      packed: values in the shape that `gather` returns; cast to the dtype of `x`.

    Raises:
      InputError: as `gather`, or if `packed` has another shape than `support`.

    Example:
      >>> import jax.numpy as jnp
      >>> scatter(jnp.zeros((2, 2)), jnp.array([0, 3]), jnp.array([1.0, 4.0]))
      Array([[1., 0.],
             [0., 4.]], dtype=float32)
    """
    layout = granularity_named(granularity)
    _require_support(layout, x, support, layers)
    shape = x.shape[int(support.ndim > layout.ndim) :]
    wanted = layout.packed_shape(support.shape, shape)
    if packed.shape != wanted:
        raise InputError(
            f"`packed` must have the shape of what `gather` returns, {list(wanted)}, "
            f"got {list(packed.shape)}."
        )
    return layout.scatter(*jax.tree.map(jnp.asarray, (x, support, packed, layers)))


def _require_support(
    layout: Layout, x: jax.Array, support: jax.Array, layers: jax.Array | None
) -> None:
    """Raises unless an array has a support like this."""
    stacked = support.ndim == layout.ndim + 1
    shape = x.shape[int(stacked) :]
    layout.require("x", shape)
    size = math.prod(shape)
    like = jax.eval_shape(lambda: layout.empty(shape, size))
    rows = x.shape[0] if layers is None else layers.shape[0]
    fits = (
        jnp.issubdtype(support.dtype, jnp.integer)
        and support.dtype.itemsize >= like.dtype.itemsize
        and support.ndim == like.ndim + stacked
        and support.shape[int(stacked) + 1 :] == like.shape[1:]
        and (not stacked or support.shape[0] == rows)
        and min(layout.packed_shape(support.shape, shape)) >= 0
    )
    if not fits:
        names = [name for name, one in GRANULARITIES.items() if one == layout]
        raise InputError(
            f"`support` must be one of granularity {(names or [layout])[0]!r} of an "
            f"array of shape {list(x.shape)}, got {support.dtype}"
            f"{list(support.shape)}. Pass the `granularity` that it was chosen by."
        )
    # Numbers are known outside of `jit`, unless other processes hold some of them.
    if isinstance(support, Tracer) or not getattr(
        support, "is_fully_addressable", True
    ):
        return
    known = np.asarray(support)
    (positions,) = layout.to_positions(known, x.shape)
    is_sorted = (np.diff(positions) > 0).all()
    inside = ((positions >= 0) & (positions < size)).all()
    # Numbers of another order, or of nothing, are not those of their positions.
    if not (
        is_sorted
        and inside
        and np.array_equal(layout.from_positions(positions, x.shape)[0], known)
    ):
        raise InputError(
            f"`support` must hold distinct, ascending numbers of entries, below "
            f"{size}, got others. Make it by `top_k_support`, or sort it."
        )
