"""The word table of decoders with layer norms, and what follows it."""

import jax
from flax import nnx

from sparse_jax.models.classic_config import ClassicConfig
from sparse_jax.models.dropout import dropout
from sparse_jax.models.linear import embed, layer_norm

__all__ = ["ClassicEmbeddings"]

_EMBEDDINGS = 0x656D  # any number above that of the layers, whose keys are the others


class ClassicEmbeddings(nnx.Module):
    """Vectors of words, of their positions if these have a table, and a norm if any.

    Leaves are `word/embedding`, `position/embedding`, `norm/scale` and `norm/bias`.
    """

    def __init__(
        self,
        config: ClassicConfig,
        rngs: nnx.Rngs,
        *,
        has_positions: bool = False,
        has_norm: bool = False,
    ):
        self.rate = config.embedding_dropout
        self.word = embed(config, config.vocab_size, rngs)
        rows = config.max_positions
        self.position = embed(config, rows, rngs) if has_positions else None
        self.norm = layer_norm(config, rngs) if has_norm else None

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Looks up the vectors `[B, T, D]` of int32 ids and positions `[B, T]`."""
        x = self.word(input_ids)
        if self.position is not None:
            x = x + self.position(positions)
        if self.norm is not None:
            x = self.norm(x)
        key = None if key is None else jax.random.fold_in(key, _EMBEDDINGS)
        return dropout(x, self.rate, key)
