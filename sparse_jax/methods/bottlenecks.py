"""Bottleneck adapters: behind a linear map (series) or beside it (parallel)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, final

import jax
import jax.numpy as jnp
import optax

from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method, refuse_to_merge
from sparse_jax.methods.sites import Added, channels, kernels_at, uniform
from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.models.attachment import Module
from sparse_jax.models.modules import product
from sparse_jax.params.arguments import require_whole
from sparse_jax.params.fields import option
from sparse_jax.params.names import Rule
from sparse_jax.params.positive import require_positive

__all__ = ["Bottleneck", "HOULSBY", "PFEIFFER", "Parallel", "Series"]

# Houlsby et al., 2019: before both residual connections of a layer.
HOULSBY = ("^attention/output$", "^mlp/down$")
# Pfeiffer et al., 2021: once for each layer.
PFEIFFER = ("^mlp/down$",)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method, ABC):
    """The base of adapters with two thin linear maps and an activation between.

        branch(z) = scale * (activation(z @ D + d) @ U + u)

    D, shape=(L, in, size), starts uniform in +-1 / sqrt(in), everything else at zero,
    so that the start is the base model. All are float32 and used in the dtype of z.

    It cannot be merged: an activation is no linear map.

    Raises:
      InputError: if `size` or `scale` is not positive, or (on `added`) nothing matches
        `where`.
    """

    # Axis of a kernel, [L, in, out], that is as wide as what the bottleneck reads.
    _axis: ClassVar[int]

    size: int
    where: Rule = HOULSBY
    activation: Callable[[jax.Array], jax.Array] = field(
        default=jax.nn.relu,
        metadata=option(words=ACTIVATIONS),
    )
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_whole("size", self.size)
        if self.size < 1:
            raise InputError(
                f"`size` must be at least 1, got {self.size}. It is the width of the "
                "bottleneck, commonly 16 to 256."
            )
        require_positive("scale", self.scale, "Leave it out for 1.")

    def added(self, params: optax.Params, key: jax.Array) -> Added:
        """Returns {site: {"down", "down_bias", "up", "up_bias"}} of matching sites."""

        def create(site: str, kernel: jax.Array) -> dict[str, jax.Array]:
            layers, _, height = kernel.shape
            width = kernel.shape[self._axis]
            return {
                "down": uniform(key, site, (layers, width, self.size)),
                "down_bias": jnp.zeros((layers, self.size), jnp.float32),
                "up": jnp.zeros((layers, self.size, height), jnp.float32),
                "up_bias": jnp.zeros((layers, height), jnp.float32),
            }

        kernels = kernels_at("where", self.where, params, self.stack)
        return {site: create(site, kernel) for site, kernel in kernels.items()}

    def response(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        added: Added,
        strength: jax.typing.ArrayLike = 1.0,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the output of the linear map plus that of the bottleneck."""
        del key
        y = module(x)
        if site not in added:
            return y
        arrays, z = added[site], self._reads(x, y)
        low = product(z, arrays["down"].astype(z.dtype))
        low = self.activation(low + channels(arrays["down_bias"], z))
        high = product(low, arrays["up"].astype(z.dtype))
        high = high + channels(arrays["up_bias"], z)
        return y + jnp.asarray(self.scale * strength, z.dtype) * high

    def merge(self, params: optax.Params, added: Added) -> optax.Params:
        """Raises if anything is added."""
        return refuse_to_merge(self, params, added)

    @staticmethod
    @abstractmethod
    def _reads(x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns what the bottleneck reads: the input or the output of the map."""


@final
@dataclass(frozen=True, kw_only=True)
class Series(Bottleneck):
    """Trains a bottleneck behind the linear maps at the sites that `where` matches.

        y' = y + scale * (activation(y @ D + d) @ U + u),   y = x @ W + bias

    `where` is `HOULSBY` by default, both sublayers of a layer; `PFEIFFER` is one.
    The arrays and errors are those of `Bottleneck`; it cannot be merged.

    Differs from the paper: the adapter sees y before the dropout, not after it, and
    the norms are not trained unless `dense` matches them ("norm/").

    Example:
      >>> from sparse_jax.methods.bottlenecks import PFEIFFER
      >>> Series(size=64, where=PFEIFFER, dense="classifier").size
      64

    References:
      Houlsby et al., 2019, https://arxiv.org/abs/1902.00751
      Pfeiffer et al., 2021, https://arxiv.org/abs/2005.00247
    """

    _axis = 2

    @staticmethod
    def _reads(x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the output."""
        del x
        return y


@final
@dataclass(frozen=True, kw_only=True)
class Parallel(Bottleneck):
    """Trains a bottleneck beside the linear maps at the sites that `where` matches.

        y' = x @ W + bias + scale * (activation(x @ D + d) @ U + u)

    The arrays and errors are those of `Bottleneck`; it cannot be merged.

    Differs from the paper: the adapter is parallel to one linear map, as in
    LLM-Adapters, not to the whole feed-forward part.

    Example:
      >>> Parallel(size=64, where="^mlp/(up|down)$", scale=4.0).scale
      4.0

    References:
      He et al., 2022, https://arxiv.org/abs/2110.04366
      Hu et al., 2023, LLM-Adapters, https://arxiv.org/abs/2304.01933
    """

    where: Rule = PFEIFFER

    _axis = 1

    @staticmethod
    def _reads(x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the input."""
        del y
        return x
