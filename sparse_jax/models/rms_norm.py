"""The norm of decoders: division by the root mean square."""

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["RmsNorm"]


class RmsNorm(nnx.Module):
    """Scales vectors to a root mean square of one, then by a learnt scale.

        y = x / sqrt(mean(x^2) + eps) * (offset + scale)

    The mean is taken in float32.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        self.scale = nnx.Param(jnp.full(size, 1.0 - offset))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Norms the last axis, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(mean + self.eps)
        scale = self.scale[...].reshape(*[1] * (x.ndim - 1), -1)
        if self.offset:
            # Gemma multiplies in float32 and rounds last; the others round first.
            return (y * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * scale
