"""The encoder: self-attention over a padded batch, layer by layer."""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.models.attachment import Respond
from sparse_jax.models.attend import (
    Mask,
    Reach,
    attend,
    memory_of,
    remember,
    split_heads,
)
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.family import Body, Family
from sparse_jax.models.modules import (
    Inputs,
    dropout,
    embed,
    layer_norm,
    linear,
    noisy,
    split_key,
)
from sparse_jax.models.stack import LayerOptions, run_layers, stack_layers

__all__ = ["Attention", "Embeddings", "Encoder", "EncoderConfig", "EncoderLayer", "Mlp"]


class Attention(nnx.Module):
    """Self-attention with its residual connection and layer norm: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        own, others = config.output_dropout, config.hidden_dropout
        self.output_dropout = others if own is None else own
        self.query = linear(config, size, size, rngs)
        self.key = linear(config, size, size, rngs)
        self.value = linear(config, size, size, rngs)
        self.output = linear(config, size, size, rngs)
        self.norm = layer_norm(config, rngs)

    def __call__(
        self, x: jax.Array, mask: Mask, key: jax.Array | None, respond: Respond
    ) -> jax.Array:
        """Attends within each sequence to its tokens."""
        attention_key, output_key = split_key(key, 2)
        width = x.shape[-1] // self.num_heads
        q = split_heads(respond("attention/query", self.query, x), width)
        k = split_heads(respond("attention/key", self.key, x), width)
        v = split_heads(respond("attention/value", self.value, x), width)
        seen = remember(memory_of(respond, x), k, v, mask)
        rate = self.attention_dropout
        mixed = attend(q, seen.k, seen.v, seen.bias, seen.mask, rate, attention_key)
        mixed = mixed.reshape(x.shape)
        y = respond("attention/output", self.output, mixed)
        x = x + dropout(y, self.output_dropout, output_key)
        return respond("attention/norm", self.norm, x)


class Embeddings(nnx.Module):
    """Sum of the word, position and any token-type vectors, normed: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        num_positions = config.max_positions + config.position_offset
        self.hidden_dropout = config.hidden_dropout
        self.word = embed(config, config.vocab_size, rngs)
        self.position = embed(config, num_positions, rngs)
        types = config.type_vocab_size
        self.token_type = embed(config, types, rngs) if types else None
        self.norm = layer_norm(config, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        position_ids: jax.Array,
        token_type_ids: jax.Array,
        key: jax.Array | None,
        noise: float = 0.0,
    ) -> jax.Array:
        """Looks up int32 `[B, T]` ids of the three kinds."""
        x = noisy(self.word(input_ids), noise, key)
        if self.token_type is not None:
            x = x + self.token_type(token_type_ids)
        x = self.norm(x + self.position(position_ids))
        return dropout(x, self.hidden_dropout, key)


class Mlp(nnx.Module):
    """Two linear maps with an activation between, residual and norm: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.hidden_dropout = config.hidden_dropout
        self.up = linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down = linear(config, config.intermediate_size, config.hidden_size, rngs)
        self.norm = layer_norm(config, rngs)

    def __call__(
        self, x: jax.Array, key: jax.Array | None, respond: Respond
    ) -> jax.Array:
        """Maps every token on its own."""
        hidden = ACTIVATIONS[self.activation](respond("mlp/up", self.up, x))
        y = respond("mlp/down", self.down, hidden)
        x = x + dropout(y, self.hidden_dropout, key)
        return respond("mlp/norm", self.norm, x)


class EncoderLayer(nnx.Module):
    """One Transformer block, normed after each residual connection: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: jax.Array, mask: Mask, key: jax.Array | None, respond: Respond
    ) -> jax.Array:
        """Attends, then maps every token."""
        attention_key, mlp_key = split_key(key, 2)
        x = self.attention(x, mask, attention_key, respond)
        return self.mlp(x, mlp_key, respond)


def _mask(is_token: jax.Array) -> Mask:
    """Returns a mask by which all tokens of a row see each other."""
    segments = is_token.astype(jnp.int32)
    return Mask(is_token[:, None, None], segments, jnp.int32(0), (Reach(),))


BODY = Body(
    embeddings=Embeddings,
    layer=EncoderLayer,
    norm=None,
    context=lambda config, is_token, positions: ((_mask(is_token),), None),
)


class Encoder(nnx.Module):
    """The part of a model below its head.

    Leaves are `embeddings/...` and `layers/...`; those under `layers/` are stacked,
    with the layer as leading axis `[L]`. Pre-normed encoders also have `norm/...`.
    """

    def __init__(self, family: Family, config: EncoderConfig, rngs: nnx.Rngs):
        self.family = family
        self.config = config
        body = family.body or BODY
        self.embeddings = body.embeddings(config, rngs)
        self.layers = stack_layers(
            lambda rngs: body.layer(config, rngs), config.num_layers, rngs
        )
        self.norm = None if body.norm is None else body.norm(config, rngs)
        self.context = body.context

    def encode(
        self,
        batch: Inputs,
        *,
        key: jax.Array | None = None,
        noise: float = 0.0,
        **options: Unpack[LayerOptions],
    ) -> jax.Array:
        """Returns the last hidden states `[B, T, D]` of a batch.

        Sequences longer than `config.max_positions` have no position vectors and
        give NaN.

        Args:
          batch: int32 `[B, T]` arrays `input_ids`, `attention_mask` (1 at tokens, 0
            at padding) and, optionally, `token_type_ids` (zeros if absent).
          key: source of the dropout and the noise; None turns both off.
          noise: alpha of NEFTune.
          **options: the others of `run_layers`.
        """
        input_ids = batch["input_ids"]
        token_type_ids = batch.get("token_type_ids", jnp.zeros_like(input_ids))
        position_ids = self.family.position_ids(input_ids, self.config.pad_id)
        is_token = batch["attention_mask"].astype(bool)
        table_key, layers_key = split_key(key, 2)
        ids = (input_ids, position_ids, token_type_ids)
        x = self.embeddings(*ids, table_key, noise)
        context, kinds = self.context(self.config, is_token, position_ids)
        more = {"key": layers_key, "kinds": kinds, **options}
        x = run_layers(self.layers, x, *context, **more)
        return x if self.norm is None or options.get("states") else self.norm(x)
