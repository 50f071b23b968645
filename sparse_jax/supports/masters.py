"""Masters: the float32 values of trained leaves that are too coarse for small updates.

A packed tree of masters has an array for every trained leaf of bfloat16 or float16, and
`optax.MaskedNode()` elsewhere. The array is float32, or what a bfloat16 weight
lacks of its master, two bytes; the dtype tells which.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from sparse_jax.supports.packing import below_float32
from sparse_jax.supports.roles import TRAINED, Role, Roles, map_roles

__all__ = [
    "current_values",
    "keep_masters",
    "kept_of",
    "master_of",
    "remainder_of",
    "value_of",
]

_LEAST, _MOST = -(2**15), 2**15 - 1


@jax.jit
def remainder_of(master: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns what a weight lacks of the master that it was rounded from.

        remainder = clip(bits(master) - 2**16 bits(weight), -2**15, 2**15 - 1)

    Bits of floating-point numbers are ordered as their magnitudes are, so that these
    are units in the last place of the master, whatever its sign, and a carry into the
    exponent, up to infinity, is counted like any other.

    Rounding to the nearest leaves a difference in [-2**15, 2**15]. Of the ties those
    that were rounded down need 2**15, one too many for int16: these masters, one in
    2**17, move by one unit, 2**-24 of their size, towards the weight, which stays what
    it is. All others are exact.

    Args:
      master: float32.
      weight: the master, rounded to bfloat16, in the same shape.

    Returns:
      The difference, int16.

    References:
      Kalamkar et al., 2020, Split-SGD-BF16: https://arxiv.org/abs/2005.04680

    Example:
      >>> master = jnp.float32([1.00001, -0.3])
      >>> weight = master.astype(jnp.bfloat16)
      >>> rest = remainder_of(master, weight)
      >>> rest, master_of(weight, rest) == master
      (Array([    84, -26214], dtype=int16), Array([ True,  True], dtype=bool))
    """
    apart = lax.bitcast_convert_type(master, jnp.int32) - _upper(weight)
    # Beyond the ties this meets a NaN, whose payload is cut, and numbers below 2**-126
    # where a processor takes them for zero.
    return jnp.clip(apart, _LEAST, _MOST).astype(jnp.int16)


def master_of(weight: jax.Array, remainder: jax.Array) -> jax.Array:
    """Returns the float32 master of a bfloat16 weight, as `remainder_of` left it."""
    upper, rest = _upper(weight), remainder.astype(jnp.int32)
    # Below a zero are the bits of a NaN. No master that was rounded to zero is there;
    # a position past the end of a shard reads zero, whatever its remainder is.
    rest = jnp.where(upper << 1 == 0, jnp.maximum(rest, 0), rest)
    return lax.bitcast_convert_type(upper + rest, jnp.float32)


def keep_masters(
    roles: Roles, packed: optax.Params, params: optax.Params, split: bool = False
) -> optax.Params:
    """Returns the masters of packed values, `MaskedNode()` for float32 leaves.

    A float32 leaf is its own master: a second copy would cost 4 bytes an entry.

    Args:
      roles: of the leaves.
      packed: the values, which the parameters have or will have, rounded.
      params: for their dtypes.
      split: whether of bfloat16 leaves only `remainder_of` is kept.
    """

    def keep(
        role: Role, values: jax.Array, leaf: jax.Array
    ) -> jax.Array | optax.MaskedNode:
        if not below_float32(leaf):
            return optax.MaskedNode()
        return kept_of(values, leaf.dtype, split)

    return map_roles(keep, roles, packed, params, only=TRAINED)


def kept_of(values: jax.Array, dtype: DTypeLike, split: bool) -> jax.Array:
    """Returns what is kept of the masters of a leaf of some coarse dtype."""
    is_split = split and dtype == jnp.bfloat16
    return remainder_of(values, values.astype(dtype)) if is_split else values


def current_values(
    roles: Roles, support: optax.Params, masters: optax.Params, params: optax.Params
) -> optax.Params:
    """Returns the packed values: masters where there are any, else the parameters."""

    def current(
        role: Role,
        leaf: jax.Array,
        support: jax.Array,
        master: jax.Array | optax.MaskedNode,
    ) -> jax.Array:
        return value_of(master, lambda: role.read(leaf, support))

    return map_roles(current, roles, params, support, masters, only=TRAINED)


def value_of(
    master: jax.Array | optax.MaskedNode, read: Callable[[], jax.Array]
) -> jax.Array:
    """Returns trained values from what is kept of them, and the weights if need be."""
    if isinstance(master, optax.MaskedNode):
        return read()
    return master_of(read(), master) if master.dtype == jnp.int16 else master


def _upper(weight: jax.Array) -> jax.Array:
    """Returns the bits of bfloat16 numbers as float32 has them, int32."""
    bits = lax.bitcast_convert_type(weight, jnp.int16)
    return bits.astype(jnp.int32) << 16
