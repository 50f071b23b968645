"""Supports: which entries of an array are trained, and how to reach them.

A support holds row-major flat positions, ascending and distinct. It has shape (k,) for
an array, and (L, k) for a stack of L layers, whose positions count within a layer, so
that int32 suffices however deep the stack.
"""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from sparse_jax.errors import InputError
from sparse_jax.supports.lanes import LaneSupport, gather_lanes, scatter_lanes
from sparse_jax.supports.sharded import (
    LocalSupport,
    gather_local,
    get_in_layers,
    scatter_local,
    set_in_layer,
)

__all__ = [
    "Support",
    "gather",
    "replicated",
    "require_density",
    "scatter",
    "support_size",
]

# Positions in an array, in each shard of an array that is cut over a mesh, or rows in
# groups of 128.
Support = jax.Array | LocalSupport | LaneSupport

# Distinct indices matter beyond speed: float32 scatters that may collide compile to a
# compare-and-swap loop on GPU in jaxlib 0.10.2 (jax issue 38806).
_DISTINCT = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
}


def require_density(density: Any) -> Any:
    """Returns a density as a number of Python, if it is a fraction of entries.

    A number of NumPy or JAX becomes the shortest decimal that rounds to it, so that
    `np.float32(0.1)` is 0.1.

    Raises:
      InputError: if `density` is outside (0, 1], or no number that is known when the
        program is traced.

    Example:
      >>> require_density(0.05), require_density(np.float32(0.1))
      (0.05, 0.1)
    """
    if isinstance(density, Tracer):
        raise InputError(
            "`density` must be static, got a traced value. It fixes shapes: keep it "
            "out of `jit`, and in `static_args=('density',)` of `inject_hyperparams`."
        )
    number: Any = _decimal(density)
    is_number = isinstance(number, int | float | Fraction)
    if not is_number or isinstance(number, bool) or not 0 < number <= 1:
        raise InputError(
            f"`density` must be in (0, 1], got {density!r}. It is the fraction of "
            "entries trained, so training 1% of them is `density=0.01`."
        )
    return number if isinstance(number, Fraction) else float(number)


def _decimal(number: Any) -> Any:
    """Returns a scalar of NumPy or JAX as a number of Python; others pass through."""
    kinds = (jax.Array, np.ndarray, np.generic)
    if not isinstance(number, kinds) or np.ndim(number) > 0:
        return number
    scalar = np.asarray(number)[()]
    if not jnp.issubdtype(scalar.dtype, jnp.floating):
        return scalar.item()
    texts = (f"{float(scalar):.{digits}g}" for digits in range(1, 18))
    same = lambda text: scalar.dtype.type(float(text)) == scalar
    return next((float(text) for text in texts if same(text)), float(scalar))


def support_size(density: float | Fraction, size: int) -> int:
    """Returns the number of entries trained in an array of `size` entries.

        k = ceil(density * size)

    The product is taken in decimal, so that 7 % of 100 is 7 and not 8.

    Example:
      >>> support_size(0.07, 100), support_size(0.01, 64)
      (7, 1)
    """
    return math.ceil(Fraction(str(density)) * size)


def gather(
    x: jax.Array, support: Support, layers: jax.Array | None = None
) -> jax.Array:
    """Returns the entries of an array at a support, in the dtype of the array.

        packed[i] = x[support[i]]

    Args:
      x: array of any shape, or a stack of layers, shape=(L, ...).
      support: positions, shape=(k,), or (L, k) for a stack; int32. Of an array that
        is cut over a mesh, a `LocalSupport`; of groups, a `LaneSupport`.
      layers: numbers of some layers of a stack, shape=(n,), int32; then the support
        is theirs, shape=(n, k). None means all.

    Returns:
      The entries, in the shape of `support`.

    Example:
      >>> gather(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0, 3]))
      Array([1., 4.], dtype=float32)
    """
    if isinstance(support, LocalSupport):
        return gather_local(x, support, layers)
    x = x if _is_cut(support) else replicated(x)
    if isinstance(support, LaneSupport):
        return gather_lanes(x, support, layers)
    if support.ndim == 1:
        return x.reshape(-1).at[support].get(**_DISTINCT)
    if layers is None:
        layers = jnp.arange(x.shape[0], dtype=jnp.int32)
    return get_in_layers(x, layers, support, **_DISTINCT)


def scatter(
    x: jax.Array,
    support: Support,
    packed: jax.Array,
    layers: jax.Array | None = None,
) -> jax.Array:
    """Returns an array with the entries at a support replaced.

        x[support[i]] = packed[i]

    Setting, not adding: a low-precision array then holds the rounded value of its
    float32 master, however small the last update was. Under `jit` with `x` donated,
    it happens in place.

    Args:
      x: array of any shape, or a stack of layers, shape=(L, ...).
      support: positions, shape=(k,), or (L, k) for a stack; int32; or a
        `LocalSupport` or `LaneSupport`.
      packed: values in the shape of `support`; cast to the dtype of `x`.
      layers: as for `gather`; the other layers stay as they are.

    Example:
      >>> scatter(jnp.zeros((2, 2)), jnp.array([0, 3]), jnp.array([1.0, 4.0]))
      Array([[1., 0.],
             [0., 4.]], dtype=float32)
    """
    if isinstance(support, LocalSupport):
        return scatter_local(x, support, packed, layers)
    spec = jax.typeof(x).sharding.spec
    x = x if _is_cut(support) else replicated(x)
    if isinstance(support, LaneSupport):
        return _resharded(scatter_lanes(x, support, packed, layers), spec)
    if support.ndim == 1:
        flat = x.reshape(-1).at[support].set(packed.astype(x.dtype), **_DISTINCT)
        return _resharded(flat.reshape(x.shape), spec)

    # Layer by layer, because one scatter over the stack, or a vmap, keeps temporaries
    # of the size of the packed values for all layers at once (measured: 5.0 MB
    # against 0.6 MB for 8 layers of 1 M entries, 5 %).
    def set_layer(i: jax.Array, stack: jax.Array) -> jax.Array:
        layer = i if layers is None else layers[i]
        values = packed[i].astype(x.dtype)
        return set_in_layer(stack, layer, support[i], values, **_DISTINCT)

    return _resharded(lax.fori_loop(0, support.shape[0], set_layer, x), spec)


def replicated(x: jax.Array) -> jax.Array:
    """Gathers an array that is sharded over explicit mesh axes; others pass through.

    Flat positions need the whole array. Under automatic axes the compiler gathers it
    by itself; under explicit axes JAX wants to be told.
    """
    return _resharded(x, jax.P()) if any(jax.typeof(x).sharding.spec) else x


def _is_cut(support: jax.Array | LaneSupport) -> bool:
    """Returns whether every device reaches its own part of an array."""
    return isinstance(support, LaneSupport) and support.cut is not None


def _resharded(x: jax.Array, spec: jax.P) -> jax.Array:
    """Returns an array in an explicit sharding, if it is in another one."""
    return x if jax.typeof(x).sharding.spec == spec else jax.reshard(x, spec)
