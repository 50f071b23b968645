"""DoRA: train the length of every column of a kernel, and its direction by LoRA."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.adapters.channels import channels
from sparse_jax.adapters.lora import LoRA
from sparse_jax.adapters.placement import kernels_at, map_sites
from sparse_jax.sites import Module

__all__ = ["DoRA"]


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Trains the linear maps at the sites that `where` matches as length x direction.

        y = m * (x @ W + scale * dropout(x) @ A @ B) / n + bias
        n = ||W + scale * A @ B||, of each column, a constant in the backward pass

    A and B are LoRA's; m, shape=(L, out), starts at the norms of the columns of W, so
    that the start is the base model. Merging is exact up to rounding:
    m * (W + scale * A @ B) / n.

    `strength` multiplies `scale` in the sum and in the norm, and keeps m, as in the
    released code of IST: at strength 0 a site has the directions of the base and the
    lengths m, and is the base model only as long as m has not been trained.

    Differs from PEFT: `dropout` touches nothing but the input of A.

    Raises:
      InputError: as `LoRA`.

    Example:
      >>> DoRA(rank=8, where="query|value", dense="classifier").scale
      2.0

    References:
      Liu et al., 2024, Sec. 4, https://arxiv.org/abs/2402.09353
    """

    def added(self, params: Any, key: jax.Array) -> Any:
        """Returns {site: {"a": ..., "b": ..., "m": ...}} for every matching site."""
        kernels = kernels_at("where", self.where, params, self.stack)
        pairs = super().added(params, key)
        return {
            site: {**pairs[site], "m": _root(_squares(kernel))}
            for site, kernel in kernels.items()
        }

    def response(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        added: Any,
        strength: jax.typing.ArrayLike = 1.0,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the output of the linear map with new lengths and directions."""
        if site not in added:
            return module(x)
        linear: Any = module
        arrays, kernel = added[site], linear.kernel[...]
        scale = jnp.asarray(self.scale * strength, jnp.float32)
        norm = lax.stop_gradient(_norms(kernel, arrays["a"], arrays["b"], scale))
        y = x @ kernel.astype(x.dtype)
        y = y + scale.astype(x.dtype) * self._product(site, x, arrays, key)
        y = y * channels(arrays["m"] / norm, x)
        if getattr(linear, "bias", None) is None:
            return y
        return y + channels(linear.bias[...], x)

    def merge(self, params: Any, added: Any) -> Any:
        """Returns parameters with the new kernels."""

        def change(kind: str, leaf: jax.Array, arrays: Any) -> jax.Array:
            if kind != "kernel":
                return leaf
            direction = leaf + self.scale * (arrays["a"] @ arrays["b"])
            length = arrays["m"] / _root(_squares(direction))
            return length[..., None, :] * direction

        return map_sites(change, params, added, self.stack)


def _squares(kernel: jax.Array) -> jax.Array:
    """Returns the sum of the squares of every column, float32."""
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)


def _root(squares: jax.Array) -> jax.Array:
    """Returns the norms, of which none is zero: a column of zeros has a direction."""
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def _norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array):
    """Returns ||W + scale * A @ B|| of each column, shape=(out,).

    The square is multiplied out, so that no array of the size of W is made:
    |w|^2 + 2 scale b.(A^T w) + scale^2 |A b|^2 for each column w of W and b of B.
    """
    low = a.astype(kernel.dtype)
    cross = jnp.einsum("ir,io->ro", low, kernel, preferred_element_type=jnp.float32)
    mixed = jnp.sum(b * cross, axis=0)
    product = jnp.sum(b * ((a.T @ a) @ b), axis=0)
    return _root(_squares(kernel) + 2 * scale * mixed + scale**2 * product)
