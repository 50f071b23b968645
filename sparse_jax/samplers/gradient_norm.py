"""Gradient norm: draw layers whose gradients have been large."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.params.positive import require_positive
from sparse_jax.samplers.sampler import Sampler

__all__ = ["GradientNorm", "GradientNormMemory"]


class GradientNormMemory(NamedTuple):
    """What the rule remembers."""

    norms: jax.Array  # shape=(L,), float32: running means
    seen: jax.Array  # shape=(L,), bool: layers that have been active


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Sampler[GradientNormMemory]):
    """Draws layers by a running mean of the norms of their gradients.

    With m `[L]` the running means, only those of active layers moving,

        m_l = decay * m_l + (1 - decay) * |g_l|,   weight_l ~ exp(m_l / (t * mean(m)))

    with t the `temperature`. A layer that was never active has the mean of the
    others. The rule of MISA (https://arxiv.org/abs/2511.00056) and GRASS
    (https://arxiv.org/abs/2604.07808), with layers as the unit and without GRASS's
    separate passes over the data.

    Raises:
      InputError: if a number breaks its rule.

    Example:
      >>> sampler = GradientNorm(num_layers=2, num_active=1, decay=0.0)
      >>> memory = sampler.observe(sampler.start(), jnp.array([0, 1]),
      ...                          jnp.array([1.0, 3.0]))
      >>> sampler.weights(memory)  # exp(0.5 - 1.5) and exp(0)
      Array([0.36787945, 1.        ], dtype=float32)
    """

    temperature: float = 1.0
    decay: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        require_positive("temperature", self.temperature)
        if not 0 <= self.decay < 1:
            raise InputError(f"`decay` must be in [0, 1), got {self.decay}.")

    @property
    def needs_norms(self) -> bool:
        """Whether `observe` reads the norms of gradients."""
        return True

    def start(self) -> GradientNormMemory:
        """Returns a memory that has seen no layer."""
        return GradientNormMemory(
            norms=jnp.zeros(self.num_layers, jnp.float32),
            seen=jnp.zeros(self.num_layers, bool),
        )

    def weights(self, memory: GradientNormMemory) -> jax.Array:
        """Returns the weights that layers are drawn with, shape=(L,), float32."""
        known = jnp.where(memory.seen, memory.norms, 0.0).sum()
        mean = known / jnp.maximum(jnp.sum(memory.seen, dtype=jnp.float32), 1)
        norms = jnp.where(memory.seen, memory.norms, mean)
        # All gradients may be zero, as those of LoRA's first factor are at the start.
        scaled = norms / jnp.where(mean > 0, mean * self.temperature, 1.0)
        # Only ratios count, and the largest of them must not overflow.
        return jnp.exp(scaled - scaled.max())

    def shown(self, memory: GradientNormMemory) -> dict[str, jax.Array]:
        """Returns the running means."""
        return {"layer_norms": memory.norms}

    def observe(
        self, memory: GradientNormMemory, active: jax.Array, norms: jax.Array
    ) -> GradientNormMemory:
        """Returns the memory with the norms of the active layers averaged in."""
        before, seen = memory.norms[active], memory.seen[active]
        mean = self.decay * before + (1 - self.decay) * norms
        # One gradient that is not finite would stay in the mean forever.
        fresh = jnp.where(seen, mean, norms)
        kept = jnp.isfinite(norms)
        return GradientNormMemory(
            norms=memory.norms.at[active].set(jnp.where(kept, fresh, before)),
            seen=memory.seen.at[active].set(seen | kept),
        )
