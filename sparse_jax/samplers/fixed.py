"""Fixed: draw layers with weights that never change."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.samplers.sampler import Sampler

__all__ = ["Fixed"]


@dataclass(frozen=True, kw_only=True)
class Fixed(Sampler):
    """Draws layers without replacement in proportion to given numbers.

    OwLore (Li et al., 2024, https://arxiv.org/abs/2405.18380) takes the share of
    outliers in each layer.

    Raises:
      InputError: unless there is one number a layer, none negative, and enough of
        them positive.

    Example:
      >>> sampler = Fixed(num_layers=3, num_active=1, proportions=(0.0, 1.0, 0.0))
      >>> sampler.draw((), jax.random.key(0), 0)
      Array([1], dtype=int32)
    """

    proportions: tuple[float, ...]

    def __post_init__(self):
        super().__post_init__()
        if len(self.proportions) != self.num_layers:
            raise InputError(
                f"`proportions` must have num_layers={self.num_layers} numbers, got "
                f"{len(self.proportions)}."
            )
        if not all(math.isfinite(p) and p >= 0 for p in self.proportions):
            raise InputError(
                f"`proportions` must not be negative, got {self.proportions}."
            )
        positive = sum(p > 0 for p in self.proportions)
        if positive < self.num_active:
            raise InputError(
                f"`proportions` must have num_active={self.num_active} positive "
                f"numbers, got {positive}. A layer of weight 0 is never drawn."
            )

    def weights(self, memory: Any) -> jax.Array:
        """Returns the proportions."""
        del memory
        return jnp.array(self.proportions, jnp.float32)
