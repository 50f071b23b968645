"""The layers of ModernBERT: normed before attention and MLP, gated, with windows."""

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
from sparse_jax.models.config import EncoderConfig, LayerKind
from sparse_jax.models.family import Body, Context
from sparse_jax.models.modules import (
    dropout,
    embed,
    layer_norm,
    linear,
    noisy,
    split_key,
)
from sparse_jax.models.position_embeddings import Turn, rotate, turn_of
from sparse_jax.models.stack import of_kinds

__all__ = ["PRENORM", "NormedHead"]


class _Words(nnx.Module):
    """Vectors of words, normed: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.word = embed(config, config.vocab_size, rngs)
        self.norm = _norm(config, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        position_ids: jax.Array,
        token_type_ids: jax.Array,
        key: jax.Array | None,
        noise: float = 0.0,
    ) -> jax.Array:
        """Looks up int32 `[B, T]` ids."""
        del position_ids, token_type_ids
        return self.norm(noisy(self.word(input_ids), noise, key))


class _Attention(nnx.Module):
    """Self-attention with rotary positions, no residual: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.head_size = config.head_size
        self.rate = config.attention_dropout
        make = lambda: linear(config, size, size, rngs, use_bias=config.attention_bias)
        self.norm = _norm(config, rngs)
        self.query = make()
        self.key = make()
        self.value = make()
        self.output = make()

    def __call__(
        self,
        x: jax.Array,
        turn: Turn,
        mask: Mask,
        is_normed: jax.Array,
        key: jax.Array | None,
        respond: Respond,
    ) -> jax.Array:
        """Attends to the keys that a mask shows."""
        weights_key, output_key = split_key(key, 2)
        # The words are normed already, so that the first layer does not.
        x = jnp.where(is_normed, respond("attention/norm", self.norm, x), x)
        q = split_heads(respond("attention/query", self.query, x), self.head_size)
        k = split_heads(respond("attention/key", self.key, x), self.head_size)
        v = split_heads(respond("attention/value", self.value, x), self.head_size)
        q, k = rotate(q, turn), rotate(k, turn)
        seen = remember(memory_of(respond, x), k, v, mask)
        mixed = attend(q, seen.k, seen.v, seen.bias, seen.mask, self.rate, weights_key)
        y = respond("attention/output", self.output, mixed.reshape(x.shape))
        return dropout(y, self.rate, output_key)


class _Mlp(nnx.Module):
    """A gated pair of linear maps, and one back, no residual: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        size, hidden = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.rate = config.hidden_dropout
        make = lambda num_in, num_out: linear(
            config, num_in, num_out, rngs, use_bias=config.mlp_bias
        )
        self.norm = _norm(config, rngs)
        self.gate = make(size, hidden)
        self.up = make(size, hidden)
        self.down = make(hidden, size)

    def __call__(
        self, x: jax.Array, key: jax.Array | None, respond: Respond
    ) -> jax.Array:
        """Maps every token on its own."""
        x = respond("mlp/norm", self.norm, x)
        gate = ACTIVATIONS[self.activation](respond("mlp/gate", self.gate, x))
        hidden = dropout(gate * respond("mlp/up", self.up, x), self.rate, key)
        return respond("mlp/down", self.down, hidden)


class _Layer(nnx.Module):
    """One Transformer block, normed before attention and MLP: `[B, T, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.attention = _Attention(config, rngs)
        self.mlp = _Mlp(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        turn: Turn,
        mask: Mask,
        is_normed: jax.Array,
        key: jax.Array | None,
        respond: Respond,
    ) -> jax.Array:
        """Attends, then maps every token."""
        attention_key, mlp_key = split_key(key, 2)
        x = x + self.attention(x, turn, mask, is_normed, attention_key, respond)
        return x + self.mlp(x, mlp_key, respond)


class NormedHead(nnx.Module):
    """A linear map, its activation and a norm, of vectors `[B, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.activation = config.head_act or config.hidden_act
        self.dense = linear(config, size, size, rngs, use_bias=config.head_bias)
        self.norm = _norm(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, D]` to `[B, D]`."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Creates a norm."""
    return layer_norm(config, rngs, use_bias=config.norm_bias)


def _context(
    config: EncoderConfig, is_token: jax.Array, positions: jax.Array
) -> Context:
    """Returns angles, masks and whether to norm: of the first layer, then by kind."""
    numbers = config.layer_kinds or (0,) * config.num_layers
    distance = jnp.abs(positions[:, :, None] - positions[:, None, :])
    windows = tuple(kind.sliding_window for kind in config.kinds)
    segments, reaches = is_token.astype(jnp.int32), tuple(map(Reach, windows, windows))

    def of(one: tuple[LayerKind, bool]) -> tuple[Turn, Mask, jax.Array]:
        kind, is_normed = one
        window = kind.sliding_window
        is_near = distance >= 0 if window is None else distance <= window
        seen = (is_near & is_token[:, None])[:, None]
        number = jnp.int32(windows.index(window))
        mask = Mask(seen, segments, number, reaches)
        return turn_of(kind, config.head_size, positions), mask, jnp.array(is_normed)

    first, others = config.kinds[numbers[0]], [(kind, True) for kind in config.kinds]
    kinds = (0, *(1 + number for number in numbers[1:]))
    return of_kinds([(first, False), *others], of), kinds


PRENORM = Body(embeddings=_Words, layer=_Layer, norm=_norm, context=_context)
