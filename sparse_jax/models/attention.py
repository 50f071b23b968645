"""Multi-head self-attention over a padded batch."""

from typing import Any

import jax
from flax import nnx

from sparse_jax.models.attend import attend, split_heads
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.dropout import dropout, split_key
from sparse_jax.models.linear import layer_norm, linear
from sparse_jax.models.memory import no_memory, remember
from sparse_jax.sites import MEMORY, Respond

__all__ = ["Attention"]


class Attention(nnx.Module):
    """Self-attention with its residual connection and layer norm: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.hidden_dropout = config.hidden_dropout
        self.query = linear(config, size, size, rngs)
        self.key = linear(config, size, size, rngs)
        self.value = linear(config, size, size, rngs)
        self.output = linear(config, size, size, rngs)
        self.norm = layer_norm(config, rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key: jax.Array | None, respond: Respond
    ) -> jax.Array:
        """Attends within each sequence; `mask` is True at tokens, `[B, 1, 1, T]`."""
        attention_key, output_key = split_key(key, 2)
        width = x.shape[-1] // self.num_heads
        q = split_heads(respond("attention/query", self.query, x), width)
        k = split_heads(respond("attention/key", self.key, x), width)
        v = split_heads(respond("attention/value", self.value, x), width)
        memory: Any = respond(MEMORY, no_memory, x)
        seen = remember(memory, k, v, mask)
        rate = self.attention_dropout
        mixed = attend(q, seen.k, seen.v, seen.bias, seen.mask, rate, attention_key)
        mixed = mixed.reshape(x.shape)
        y = respond("attention/output", self.output, mixed)
        x = x + dropout(y, self.hidden_dropout, output_key)
        return respond("attention/norm", self.norm, x)
