"""Static: the same layers at every update."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.samplers.sampler import Sampler

__all__ = ["Static"]


@dataclass(frozen=True, kw_only=True)
class Static(Sampler):
    """Trains a fixed list of layers.

    Raises:
      InputError: unless the layers are `num_active` different ones of the model.

    Example:
      >>> Static.of(3, 1, num_layers=4).draw((), jax.random.key(0), 0)
      Array([1, 3], dtype=int32)
    """

    layers: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        inside = {layer for layer in self.layers if 0 <= layer < self.num_layers}
        if not len(inside) == len(self.layers) == self.num_active:
            raise InputError(
                f"`layers` must be num_active={self.num_active} different numbers in "
                f"[0, {self.num_layers}), got {self.layers}."
            )

    @classmethod
    def of(cls, *layers: int, num_layers: int) -> "Static":
        """Returns the sampler of some layers of a model."""
        return cls(num_layers=num_layers, num_active=len(layers), layers=layers)

    def weights(self, memory: Any) -> jax.Array:
        """Returns 1 for the layers of the list and 0 for the others."""
        del memory
        return (
            jnp.zeros(self.num_layers, jnp.float32).at[jnp.array(self.layers)].set(1.0)
        )

    def draw(
        self, memory: Any, key: jax.Array, turn: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns the list."""
        del memory, key, turn
        return jnp.array(sorted(self.layers), jnp.int32)
