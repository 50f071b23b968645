"""A decoder with layer norms: GPT-2, GPT-J and BLOOM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.models.attachment import Respond
from sparse_jax.models.attend import (
    Attended,
    Mask,
    attend,
    memory_of,
    remember,
    split_heads,
)
from sparse_jax.models.cached import Cached, KeysValues
from sparse_jax.models.config import ClassicConfig
from sparse_jax.models.modules import (
    dropout,
    embed,
    layer_norm,
    linear,
    noisy,
    split_key,
)
from sparse_jax.models.position_embeddings import Turn, rotate_pairs

__all__ = ["ClassicEmbeddings", "ClassicLayer", "PositionInfo"]

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
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        key: jax.Array | None,
        noise: float = 0.0,
    ) -> jax.Array:
        """Looks up the vectors `[B, T, D]` of int32 ids and positions `[B, T]`."""
        x = noisy(self.word(input_ids), noise, key)
        if self.position is not None:
            x = x + self.position(positions)
        if self.norm is not None:
            x = self.norm(x)
        key = None if key is None else jax.random.fold_in(key, _EMBEDDINGS)
        return dropout(x, self.rate, key)


class PositionInfo(NamedTuple):
    """What a layer knows of where its tokens are."""

    turn: Turn | None = None  # of queries and keys
    bias: jax.Array | None = None  # of the scores, float32, shape=(B, H, 1, S)


class ClassicAttention(nnx.Module):
    """Causal self-attention with as many keys as queries, no residual."""

    def __init__(self, config: ClassicConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.rate = config.attention_dropout
        make = lambda: linear(config, size, size, rngs, use_bias=config.attention_bias)
        self.norm = layer_norm(config, rngs)
        self.query = make()
        self.key = make()
        self.value = make()
        self.output = make()

    def __call__(
        self,
        x: jax.Array,
        position: PositionInfo,
        mask: Mask,
        key: jax.Array | None,
        respond: Respond,
        cached: Cached | None,
    ) -> tuple[jax.Array, KeysValues]:
        """Attends in normed `x`, `[B, T, D]`, to the keys that a mask shows."""
        width = x.shape[-1] // self.num_heads
        q = split_heads(respond("attention/query", self.query, x), width)
        k = split_heads(respond("attention/key", self.key, x), width)
        v = split_heads(respond("attention/value", self.value, x), width)
        if position.turn is not None:
            q, k = rotate_pairs(q, position.turn), rotate_pairs(k, position.turn)
        kept = KeysValues(k, v) if cached is None else cached.put(k, v)
        k, v = (k, v) if cached is None else cached.seen(kept, q.dtype)
        seen = remember(memory_of(respond, x), k, v, mask)
        bias = _with_memory(position.bias, seen)
        mixed = attend(q, seen.k, seen.v, bias, seen.mask, self.rate, key)
        mixed = mixed.reshape(x.shape)
        return respond("attention/output", self.output, mixed), kept


class ClassicMlp(nnx.Module):
    """Two linear maps with an activation between them, no residual."""

    def __init__(self, config: ClassicConfig, rngs: nnx.Rngs, *, has_norm: bool):
        size, hidden = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.norm = layer_norm(config, rngs) if has_norm else None
        self.up = linear(config, size, hidden, rngs)
        self.down = linear(config, hidden, size, rngs)

    def __call__(self, x: jax.Array, respond: Respond) -> jax.Array:
        """Maps every token `[B, T, D]` on its own."""
        if self.norm is not None:
            x = respond("mlp/norm", self.norm, x)
        hidden = ACTIVATIONS[self.activation](respond("mlp/up", self.up, x))
        return respond("mlp/down", self.down, hidden)


class ClassicLayer(nnx.Module):
    """One Transformer block: `[B, T, D]`.

    The MLP maps what the attention returns, normed once more; in a parallel block it
    maps what the attention sees, and the two have one norm.
    """

    def __init__(
        self, config: ClassicConfig, rngs: nnx.Rngs, *, is_parallel: bool = False
    ):
        self.is_parallel = is_parallel
        self.rate = config.hidden_dropout
        self.attention = ClassicAttention(config, rngs)
        self.mlp = ClassicMlp(config, rngs, has_norm=not is_parallel)

    def __call__(
        self,
        x: jax.Array,
        position: PositionInfo,
        mask: Mask,
        key: jax.Array | None,
        respond: Respond,
    ) -> jax.Array:
        """Attends, and maps every token."""
        return self.extend(x, position, mask, key, respond, None)[0]

    def extend(
        self,
        x: jax.Array,
        position: PositionInfo,
        mask: Mask,
        key: jax.Array | None,
        respond: Respond,
        cached: Cached | None,
    ) -> tuple[jax.Array, KeysValues]:
        """Does the same after the tokens of a cache, if any.

        Returns also keys and values: of these tokens, or the cache with them.
        """
        weights_key, attention_key, mlp_key = split_key(key, 3)
        normed = respond("attention/norm", self.attention.norm, x)
        y, kept = self.attention(normed, position, mask, weights_key, respond, cached)
        y = x + dropout(y, self.rate, attention_key)
        z = self.mlp(normed if self.is_parallel else y, respond)
        return y + dropout(z, self.rate, mlp_key), kept


def _with_memory(bias: jax.Array | None, seen: Attended) -> jax.Array | None:
    """Returns the bias of all scores; a memory lies where the first token does."""
    if bias is None:
        return seen.bias
    length = seen.k.shape[1] - bias.shape[-1]
    bias = jnp.pad(bias, ((0, 0),) * 3 + ((length, 0),))
    return bias if seen.bias is None else bias + seen.bias
