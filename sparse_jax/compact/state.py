"""The state of the compact tier."""

from typing import Any, NamedTuple

import jax
import optax

__all__ = ["CompactState", "UnselectedState"]


class CompactState(NamedTuple):
    """What a step reads and returns; donate it to `jax.jit`."""

    count: jax.typing.ArrayLike  # shape=(), int32: updates made; -1 before a selection
    params: optax.Params  # current parameters, in their own dtypes
    support: Any  # sparse leaves: shape=(k,) or (L, k), int32; see `Layout`
    masters: Any  # trained leaves below float32: their float32 values
    added: Any  # arrays that the method adds, float32
    opt_state: optax.OptState  # of the trained values


class UnselectedState(CompactState):
    """A state whose supports hold nothing yet, which `step` refuses."""

    __slots__ = ()
