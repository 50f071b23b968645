"""Density: the fraction of entries that is trained."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_jax.errors import InputError

__all__ = ["require_density", "support_size"]


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
