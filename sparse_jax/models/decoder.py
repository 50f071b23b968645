"""A decoder with rotary positions: its word table and its layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.models.attachment import Respond
from sparse_jax.models.attend import Mask, attend, memory_of, remember, split_heads
from sparse_jax.models.cached import Cached, KeysValues
from sparse_jax.models.config import DecoderConfig
from sparse_jax.models.modules import RmsNorm, embed, linear, noisy
from sparse_jax.models.position_embeddings import Turn, rotate

__all__ = ["DecoderLayer", "Words"]


class Words(nnx.Module):
    """Vectors of words, whatever their positions; the leaf is `word/embedding`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.factor = config.hidden_size**0.5 if config.scales_words else None
        self.word = embed(config, config.vocab_size, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        key: jax.Array | None,
        noise: float = 0.0,
    ) -> jax.Array:
        """Looks up the vectors `[B, T, D]` of int32 ids `[B, T]`."""
        del positions
        x = self.word(input_ids)
        if self.factor is not None:
            x = x * jnp.asarray(self.factor, x.dtype)
        # As transformers has it: the noise is not scaled.
        return noisy(x, noise, key)


class DecoderAttention(nnx.Module):
    """Causal self-attention with grouped queries: `[B, T, D]`, no residual."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        size, width = config.hidden_size, config.head_size
        heads, groups = config.num_heads * width, config.num_kv_heads * width
        self.head_size = width
        self.rate = config.attention_dropout
        scalar = config.query_pre_attn_scalar
        self.scale = None if scalar is None else scalar**-0.5
        self.cap = config.attention_softcap
        make = lambda num_in, num_out, bias: linear(
            config, num_in, num_out, rngs, use_bias=bias
        )
        self.norm = _norm(config, size)
        self.query = make(size, heads, config.qkv_bias)
        self.key = make(size, groups, config.qkv_bias)
        self.value = make(size, groups, config.qkv_bias)
        self.output = make(heads, size, config.output_bias)
        self.query_norm = _norm(config, width) if config.norms_heads else None
        self.key_norm = _norm(config, width) if config.norms_heads else None
        self.post_norm = _norm(config, size) if config.has_post_norms else None

    def __call__(
        self,
        x: jax.Array,
        turn: Turn,
        mask: Mask,
        key: jax.Array | None,
        respond: Respond,
        cached: Cached | None,
    ) -> tuple[jax.Array, KeysValues]:
        """Attends to the keys that a mask shows."""
        x = respond("attention/norm", self.norm, x)
        q = split_heads(respond("attention/query", self.query, x), self.head_size)
        k = split_heads(respond("attention/key", self.key, x), self.head_size)
        v = split_heads(respond("attention/value", self.value, x), self.head_size)
        if self.query_norm is not None and self.key_norm is not None:
            q = respond("attention/query_norm", self.query_norm, q)
            k = respond("attention/key_norm", self.key_norm, k)
        q, k = rotate(q, turn), rotate(k, turn)
        kept = KeysValues(k, v) if cached is None else cached.put(k, v)
        k, v = (k, v) if cached is None else cached.seen(kept, q.dtype)
        seen = remember(memory_of(respond, x), k, v, mask)
        mixed = attend(
            q, seen.k, seen.v, seen.bias, seen.mask, self.rate, key,
            scale=self.scale, cap=self.cap,
        )  # fmt: skip
        mixed = mixed.reshape(*x.shape[:-1], -1)
        y = respond("attention/output", self.output, mixed)
        if self.post_norm is not None:
            y = respond("attention/post_norm", self.post_norm, y)
        return y, kept


class GatedMlp(nnx.Module):
    """A gated pair of linear maps, and one back: `[B, T, D]`, no residual."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        size, hidden = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        make = lambda num_in, num_out: linear(
            config, num_in, num_out, rngs, use_bias=config.mlp_bias
        )
        self.norm = _norm(config, size)
        self.gate = make(size, hidden)
        self.up = make(size, hidden)
        self.down = make(hidden, size)
        self.post_norm = _norm(config, size) if config.has_post_norms else None

    def __call__(self, x: jax.Array, respond: Respond) -> jax.Array:
        """Maps every token on its own."""
        x = respond("mlp/norm", self.norm, x)
        gate = ACTIVATIONS[self.activation](respond("mlp/gate", self.gate, x))
        hidden = gate * respond("mlp/up", self.up, x)
        y = respond("mlp/down", self.down, hidden)
        if self.post_norm is not None:
            y = respond("mlp/post_norm", self.post_norm, y)
        return y


class DecoderLayer(nnx.Module):
    """One Transformer block, normed before attention and MLP: `[B, T, D]`.

    With `has_post_norms` what they return is normed as well, before it is added.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention = DecoderAttention(config, rngs)
        self.mlp = GatedMlp(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        turn: Turn,
        mask: Mask,
        key: jax.Array | None,
        respond: Respond,
    ) -> jax.Array:
        """Attends, then maps every token."""
        return self.extend(x, turn, mask, key, respond, None)[0]

    def extend(
        self,
        x: jax.Array,
        turn: Turn,
        mask: Mask,
        key: jax.Array | None,
        respond: Respond,
        cached: Cached | None,
    ) -> tuple[jax.Array, KeysValues]:
        """Does the same after the tokens of a cache, if any.

        Returns also keys and values: of these tokens, or the cache with them.
        """
        y, kept = self.attention(x, turn, mask, key, respond, cached)
        x = x + y
        return x + self.mlp(x, respond), kept


def _norm(config: DecoderConfig, size: int) -> RmsNorm:
    """Creates a norm."""
    return RmsNorm(size, config.norm_eps, config.norm_offset)
