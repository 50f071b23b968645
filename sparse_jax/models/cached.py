"""Keys and values of the tokens before, which every new token meets again."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Cached", "KeysValues"]


class KeysValues(NamedTuple):
    """Keys and values: of new tokens `[B, T, G, K]`, or of a cache."""

    k: jax.Array
    v: jax.Array


class Cached(NamedTuple):
    """Keys and values of the tokens before, and where to put the next ones.

    They lie head by head, as attention reads them.

    Example:
      >>> empty = jnp.zeros((2, 3, 5, 4))
      >>> cached, new = Cached(empty, empty, None, 1), jnp.ones((2, 1, 3, 4))
      >>> kept = cached.put(new, new)
      >>> kept.k[0, 0, :, 0].tolist(), cached.seen(kept, new.dtype)[0].shape
      ([0.0, 1.0, 0.0, 0.0, 0.0], (2, 5, 3, 4))
    """

    k: jax.Array  # shape=(B, G, S, K), or (L, B, G, S, K) with those of all layers
    v: jax.Array  # in the shape of the keys
    layer: jax.typing.ArrayLike | None  # which of all it is, int32; None is the only
    start: jax.typing.ArrayLike  # shape=(), int32: columns in use

    def put(self, k: jax.Array, v: jax.Array) -> KeysValues:
        """Returns all of them with T more columns of the layer, `[B, T, G, K]`."""
        # One small write, which a loop does in place. An axis of one layer would be
        # removed before each product, and the write be done once more there, on a copy.
        place = (0, 0, self.start, 0)
        place = place if self.layer is None else (self.layer, *place)
        write = lambda old, new: jax.lax.dynamic_update_slice(
            old,
            jnp.swapaxes(new, 1, 2)
            .astype(old.dtype)
            .reshape(*[1] * (old.ndim - 4), *old.shape[-4:-2], -1, old.shape[-1]),
            place,
        )
        return KeysValues(write(self.k, k), write(self.v, v))

    def seen(
        self, kept: KeysValues, dtype: jax.typing.DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and values of the layer, `[B, S, G, K]`."""
        if self.layer is not None:
            pick = partial(jax.lax.dynamic_index_in_dim, keepdims=False)
            kept = KeysValues(*(pick(x, self.layer) for x in kept))
        k, v = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in kept)
        return k, v
