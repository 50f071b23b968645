"""Cyclic: block after block, each layer once in a cycle."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.samplers.sampler import Sampler

__all__ = ["Cyclic"]


@dataclass(frozen=True, kw_only=True)
class Cyclic(Sampler):
    """Trains blocks of `num_active` layers in turn.

    In order, from the bottom up (or down, `descending`), as HiFT (Liu et al., 2024,
    https://arxiv.org/abs/2401.15207); or `shuffled` anew in every cycle, as BAdam
    (Luo et al., 2024, https://arxiv.org/abs/2404.02827), which holds a block for a
    hundred updates and restarts its optimiser state. Where `num_active` does not
    divide the layers, the last block of a cycle also takes some of the one before.

    Example:
      >>> sampler = Cyclic(num_layers=5, num_active=2)
      >>> [sampler.draw((), jax.random.key(0), turn).tolist() for turn in range(4)]
      [[0, 1], [2, 3], [3, 4], [0, 1]]
    """

    descending: bool = False
    shuffled: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.descending and self.shuffled:
            raise InputError(
                "`descending` and `shuffled` must not be given together. A shuffled "
                "cycle has no direction."
            )

    def draw(
        self, memory: Any, key: jax.Array, turn: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns the block of a turn."""
        del memory
        blocks = -(-self.num_layers // self.num_active)
        place = jnp.asarray(turn, jnp.int32) % blocks
        start = jnp.minimum(place * self.num_active, self.num_layers - self.num_active)
        order = self._order(key, jnp.asarray(turn, jnp.int32) // blocks)
        return jnp.sort(jax.lax.dynamic_slice(order, (start,), (self.num_active,)))

    def _order(self, key: jax.Array, cycle: jax.Array) -> jax.Array:
        """Returns the layers in the order of a cycle."""
        if self.shuffled:
            draw_key = jax.random.fold_in(key, cycle)
            return jax.random.permutation(draw_key, self.num_layers).astype(jnp.int32)
        order = jnp.arange(self.num_layers, dtype=jnp.int32)
        return order[::-1] if self.descending else order
