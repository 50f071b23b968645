"""Bottlenecks: what series and parallel adapters have in common."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.adapters.channels import channels
from sparse_jax.adapters.method import Method, refuse_to_merge
from sparse_jax.adapters.placement import kernels_at
from sparse_jax.adapters.start import uniform
from sparse_jax.arguments import require_whole
from sparse_jax.errors import InputError
from sparse_jax.names import Rule

__all__ = ["HOULSBY", "PFEIFFER", "Bottleneck"]

# Houlsby et al., 2019: before both residual connections of a layer.
HOULSBY = ("^attention/output$", "^mlp/down$")
# Pfeiffer et al., 2021: once for each layer.
PFEIFFER = ("^mlp/down$",)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """The base of adapters with two thin linear maps and an activation between.

        branch(z) = scale * (activation(z @ D + d) @ U + u)

    D, shape=(L, in, size), starts uniform in +-1 / sqrt(in), everything else at zero,
    so that the start is the base model. All are float32 and used in the dtype of z.

    It cannot be merged: an activation is no linear map.

    Raises:
      InputError: if `size` or `scale` is not positive, or (on `added`) nothing matches
        `where`.
    """

    size: int
    where: Rule = HOULSBY
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_whole("size", self.size)
        if self.size < 1:
            raise InputError(
                f"`size` must be at least 1, got {self.size}. It is the width of the "
                "bottleneck, commonly 16 to 256."
            )
        if not 0 < self.scale < math.inf:
            raise InputError(
                f"`scale` must be positive, got {self.scale}. Leave it out for 1."
            )

    def merge(self, params: Any, added: Any) -> Any:
        """Raises if anything is added."""
        return refuse_to_merge(self, params, added)

    def _branches(self, params: Any, key: jax.Array, *, width_axis: int) -> Any:
        """Returns the arrays; axis 1 or 2 of a kernel is as wide as the input."""

        def create(site: str, kernel: jax.Array) -> dict[str, jax.Array]:
            layers, _, height = kernel.shape
            width = kernel.shape[width_axis]
            return {
                "down": uniform(key, site, (layers, width, self.size)),
                "down_bias": jnp.zeros((layers, self.size), jnp.float32),
                "up": jnp.zeros((layers, self.size, height), jnp.float32),
                "up_bias": jnp.zeros((layers, height), jnp.float32),
            }

        kernels = kernels_at("where", self.where, params, self.stack)
        return {site: create(site, kernel) for site, kernel in kernels.items()}

    def _branch(
        self, arrays: Any, z: jax.Array, strength: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns what is added to the output of a site."""
        low = z @ arrays["down"].astype(z.dtype) + channels(arrays["down_bias"], z)
        high = self.activation(low) @ arrays["up"].astype(z.dtype)
        high = high + channels(arrays["up_bias"], z)
        return jnp.asarray(self.scale * strength, z.dtype) * high
