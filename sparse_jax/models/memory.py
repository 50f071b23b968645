"""Memory: keys and values that an attention sees beside those of its tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.sites import Memory

__all__ = ["Attended", "no_memory", "remember"]


class Attended(NamedTuple):
    """What the queries of an attention meet; S is T, or P + T with a memory."""

    k: jax.Array  # shape=(B, S, H, K)
    v: jax.Array  # shape=(B, S, H, K)
    mask: jax.Array  # bool, shape=(B or 1, H or 1, T or 1, S): True where attended
    bias: jax.Array | None  # of the scores, float32, shape=(1, 1, 1, S); None is zero


def no_memory(x: jax.Array) -> Any:
    """Returns None: a layer of its own remembers nothing."""
    del x


def remember(
    memory: Memory | None, k: jax.Array, v: jax.Array, mask: jax.Array
) -> Attended:
    """Puts a memory in front of the keys and values of a batch.

    Every token sees all of the memory, which has no position: call this after keys
    have been rotated.

    Args:
      memory: what `respond(MEMORY, no_memory, x)` returned.
      k: keys, shape=(B, T, H, K); with grouped queries H counts the groups.
      v: values, in the shape of the keys.
      mask: True where a key is seen, bool, broadcast to (B, H, T, T).

    Example:
      >>> k = jnp.ones((2, 3, 1, 4))
      >>> mask = jnp.ones((2, 1, 1, 3), bool)
      >>> memory = Memory(jnp.zeros((5, 4)), jnp.zeros((5, 4)), jnp.float32(0))
      >>> seen = remember(memory, k, k, mask)
      >>> seen.k.shape, seen.mask.shape, seen.bias.shape
      ((2, 8, 1, 4), (2, 1, 1, 8), (1, 1, 1, 8))
    """
    if memory is None:
        return Attended(k, v, mask, None)
    length, num_tokens = memory.keys.shape[0], k.shape[1]
    front = lambda rows, x: jnp.concatenate(
        [
            jnp.broadcast_to(
                rows.astype(x.dtype).reshape(1, length, *x.shape[2:]),
                (x.shape[0], length, *x.shape[2:]),
            ),
            x,
        ],
        axis=1,
    )
    mask = jnp.pad(mask, ((0, 0),) * 3 + ((length, 0),), constant_values=True)
    bias = jnp.concatenate([jnp.full(length, memory.bias), jnp.zeros(num_tokens)])
    bias = bias.reshape(1, 1, 1, -1)
    return Attended(front(memory.keys, k), front(memory.values, v), mask, bias)
