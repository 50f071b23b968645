"""The word table of decoders with rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.decoder_config import DecoderConfig
from sparse_jax.models.linear import embed

__all__ = ["Words"]


class Words(nnx.Module):
    """Vectors of words, whatever their positions; the leaf is `word/embedding`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.factor = config.hidden_size**0.5 if config.scales_words else None
        self.word = embed(config, config.vocab_size, rngs)

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Looks up the vectors `[B, T, D]` of int32 ids `[B, T]`."""
        del positions, key
        x = self.word(input_ids)
        return x if self.factor is None else x * jnp.asarray(self.factor, x.dtype)
