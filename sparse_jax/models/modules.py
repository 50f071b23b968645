"""Linear maps, tables, norms and dropout as every model creates them."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.config import ClassicConfig, DecoderConfig, EncoderConfig
from sparse_jax.params.axes import is_one_cpu, keep_rows_whole

__all__ = [
    "Config", "Inputs", "RmsNorm", "dropout", "embed", "layer_norm", "linear", "noisy",
    "product", "split_key", "with_product",
]  # fmt: skip

# Arrays of a batch by name, such as `input_ids`.
Inputs = Mapping[str, jax.Array]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of the entries and scales the others by 1/(1 - rate).

    Without a key the array passes unchanged.

    Example:
      >>> dropout(jnp.ones(2), 0.5, None)
      Array([1., 1.], dtype=float32)
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


_NOISE = 0x6E66  # any number; the key also serves what comes after the words


def noisy(words: jax.Array, alpha: float, key: jax.Array | None) -> jax.Array:
    """Adds the noise of NEFTune to the vectors of words `[B, T, D]`.

        words + alpha / sqrt(T * D) * u,    u uniform in [-1, 1]

    Without a key they pass unchanged.

    References:
      Jain et al., 2024, https://arxiv.org/abs/2310.05914

    Example:
      >>> noisy(jnp.ones((1, 1, 2)), 5.0, None)
      Array([[[1., 1.]]], dtype=float32)
    """
    if key is None or alpha == 0:
        return words
    most = alpha / (words.shape[1] * words.shape[2]) ** 0.5
    key = jax.random.fold_in(key, _NOISE)
    return words + jax.random.uniform(key, words.shape, words.dtype, -most, most)


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """Splits a key into `num` keys, or no key into `num` times no key.

    Example:
      >>> split_key(None, 2)
      [None, None]
    """
    return [None] * num if key is None else list(jax.random.split(key, num))


Config = EncoderConfig | DecoderConfig | ClassicConfig


def linear(
    config: Config, num_in: int, num_out: int, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.Linear:
    """Creates `x @ kernel + bias` with a normal kernel and a zero bias, if any."""
    options: dict[str, Any] = {"use_bias": use_bias, "kernel_init": _normal(config)}
    return nnx.Linear(num_in, num_out, dot_general=_product, rngs=rngs, **options)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `x @ kernel`, `[..., F]` of `[..., D]` and `[D, F]`.

    On a CPU it is a product of two matrices. For the gradient of the kernel XLA:CPU
    would write a transposed copy of activations of rank 3, entry by entry: with the
    gradients of both kernels an MLP of 384 x 1536 took 155 ms, and takes 115.

    Example:
      >>> product(jnp.ones((1, 2, 3)), jnp.ones((3, 1))).tolist()
      [[[3.0], [3.0]]]
    """
    return _product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """Returns a product as `lax.dot_general` does, which `nnx.Linear` calls."""
    if x.ndim < 3 or not is_one_cpu():
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)


def with_product(module: Any, wrap: Callable[..., jax.Array]) -> Any:
    """Returns a linear map whose product is `wrap(product, x, kernel, ...)`.

    Of a module that is no linear map, or has a product of its own, it is the module.

    Example:
      >>> double = lambda product, *args, **options: 2 * product(*args, **options)
      >>> module = nnx.Linear(2, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> with_product(module, double)(jnp.ones((1, 2)))
      Array([[4.]], dtype=float32)
    """
    products = (_product, jax.lax.dot_general)
    if not isinstance(module, nnx.Linear) or module.dot_general not in products:
        return module
    changed = copy.copy(module)
    changed.dot_general = functools.partial(wrap, module.dot_general)
    return changed


class Table(nnx.Embed):
    """A table of vectors, of which a lookup sees whole ones on a mesh."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the vectors `[..., D]` of some rows."""
        return jnp.take(keep_rows_whole(self.embedding[...]), inputs, axis=0)


def embed(config: Config, num_rows: int, rngs: nnx.Rngs) -> Table:
    """Creates a table of normal vectors of the hidden size."""
    init = _normal(config)
    table = Table(num_rows, config.hidden_size, embedding_init=init, rngs=rngs)
    return table


def layer_norm(
    config: EncoderConfig | ClassicConfig, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.LayerNorm:
    """Creates a layer norm over the hidden size, with statistics in float32."""
    # The fast variance E[x^2] - E[x]^2 loses digits that PyTorch keeps.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        use_bias=use_bias,
        rngs=rngs,
    )


def _normal(config: Config) -> jax.nn.initializers.Initializer:
    """Returns the initializer of kernels and tables."""
    return jax.nn.initializers.normal(config.initializer_range, jnp.float32)


class RmsNorm(nnx.Module):
    """Scales vectors to a root mean square of one, then by a learned scale.

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
