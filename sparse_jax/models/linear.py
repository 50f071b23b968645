"""Linear maps, tables and norms as every model creates them."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.axes import keep_rows_whole
from sparse_jax.models.classic_config import ClassicConfig
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.decoder_config import DecoderConfig

__all__ = ["embed", "layer_norm", "linear"]

Config = EncoderConfig | DecoderConfig | ClassicConfig


def linear(
    config: Config, num_in: int, num_out: int, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.Linear:
    """Creates `x @ kernel + bias` with a normal kernel and a zero bias, if any."""
    init = _normal(config)
    return nnx.Linear(num_in, num_out, use_bias=use_bias, kernel_init=init, rngs=rngs)


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


def layer_norm(config: EncoderConfig | ClassicConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Creates a layer norm over the hidden size, with statistics in float32."""
    # The fast variance E[x^2] - E[x]^2 loses digits that PyTorch keeps.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        rngs=rngs,
    )


def _normal(config: Config) -> jax.nn.initializers.Initializer:
    """Returns the initialiser of kernels and tables."""
    return jax.nn.initializers.normal(config.initializer_range, jnp.float32)
