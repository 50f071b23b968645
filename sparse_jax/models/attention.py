"""Multi-head self-attention over a padded batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.dropout import dropout, split_key
from sparse_jax.models.linear import layer_norm, linear
from sparse_jax.models.memory import Attended, no_memory, remember
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
        heads = (*x.shape[:-1], self.num_heads, -1)
        q = respond("attention/query", self.query, x).reshape(heads)
        k = respond("attention/key", self.key, x).reshape(heads)
        v = respond("attention/value", self.value, x).reshape(heads)
        memory: Any = respond(MEMORY, no_memory, x)
        seen = remember(memory, k, v, mask)
        mixed = _attend(q, seen, self.attention_dropout, attention_key)
        mixed = mixed.reshape(x.shape)
        y = respond("attention/output", self.output, mixed)
        x = x + dropout(y, self.hidden_dropout, output_key)
        return respond("attention/norm", self.norm, x)


def _attend(
    q: jax.Array, seen: Attended, rate: float, key: jax.Array | None
) -> jax.Array:
    """Mixes the values `[B, T, H, K]`; the softmax is taken in float32."""
    k, v, mask, bias = seen
    if key is None or rate == 0:
        return jax.nn.dot_product_attention(q, k, v, bias, mask=mask)
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores), rate, key).astype(v.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, v)
