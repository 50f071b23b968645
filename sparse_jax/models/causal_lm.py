"""Decoders, and one that scores the next word."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.attachment import Attachment
from sparse_jax.models.attend import Mask, Reach
from sparse_jax.models.config import ClassicConfig, DecoderConfig, LayerKind
from sparse_jax.models.decoder import Cached
from sparse_jax.models.family import DecoderFamily
from sparse_jax.models.modules import Inputs, linear
from sparse_jax.models.stack import (
    LayerOptions,
    ModelOptions,
    of_kinds,
    run_cached_layers,
    run_layers,
    stack_layers,
)

__all__ = ["Cache", "CausalLM", "Decoder"]

_NOTHING = Attachment()


class Cache(NamedTuple):
    """What a model remembers of the tokens it has read; S columns of room."""

    k: jax.Array  # shape=(L, B, S, G, K)
    v: jax.Array  # shape=(L, B, S, G, K)
    is_token: jax.Array  # shape=(B, S), bool: False at padding and in front of the end
    positions: jax.Array  # shape=(B,), int32: tokens read, which number the next one
    length: jax.Array  # shape=(), int32: columns in use


class Decoder(nnx.Module):
    """The part of a decoder below its head.

    Its parts are those of the family. Leaves are `embeddings/...`, among them
    `embeddings/word/embedding`, `layers/...` (stacked, with the layer as leading axis
    `[L]`) and `norm/...`.
    """

    def __init__(
        self,
        family: DecoderFamily,
        config: DecoderConfig | ClassicConfig,
        *,
        rngs: nnx.Rngs,
    ):
        parts = family.parts
        self.family = family
        self.config = config
        self.embeddings = parts.embeddings(config, rngs)
        self.layers = stack_layers(
            lambda rngs: parts.layer(config, rngs), config.num_layers, rngs
        )
        self.norm = parts.norm(config, rngs)

    def hidden(
        self,
        batch: Inputs,
        *,
        key: jax.Array | None = None,
        **options: Unpack[ModelOptions],
    ) -> jax.Array:
        """Returns the last hidden states, normed, `[B, T, D]`, as of `encode`."""
        return self.norm(self.encode(batch, key=key, **options))

    def encode(
        self,
        batch: Inputs,
        *,
        key: jax.Array | None = None,
        noise: float = 0.0,
        **options: Unpack[LayerOptions],
    ) -> jax.Array:
        """Returns what leaves the last layer, `[B, T, D]`.

        Args:
          batch: int32 `[B, T]` arrays `input_ids`, `attention_mask` (1 at tokens, 0 at
            padding on either side) and, optionally, `positions` (from the mask if
            absent), `segment_ids` (attention never crosses from one to another) and
            `ends` (of trees of sequences: the column from which on a token is not
            seen; then `positions` are depths).
          key: source of the dropout and the noise; None turns both off.
          noise: alpha of NEFTune.
          **options: the others of `run_layers`.
        """
        is_token = batch["attention_mask"].astype(bool)
        positions = batch.get("positions", _positions(is_token))
        info = self.family.parts.position_info
        reaches = tuple(_reach(kind) for kind in self.config.kinds)
        context = lambda kind: (
            info(self.config, kind, positions, positions),
            _mask(kind, reaches, is_token, positions, batch),
        )
        return run_layers(
            self.layers,
            self.embeddings(batch["input_ids"], positions, key, noise),
            *of_kinds(self.config.kinds, context),
            kinds=self.config.layer_kinds,
            key=key,
            **options,
        )

    def cache(self, batch_size: int, length: int) -> Cache:
        """Returns an empty cache for `length` columns of tokens and padding."""
        config = self.config
        dtype = self.embeddings.word.embedding[...].dtype
        shape = (
            config.num_layers, batch_size, length, config.num_kv_heads, config.head_size
        )  # fmt: skip
        return Cache(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            is_token=jnp.zeros((batch_size, length), bool),
            positions=jnp.zeros(batch_size, jnp.int32),
            length=jnp.zeros([], jnp.int32),
        )

    def extend(
        self,
        batch: Inputs,
        cache: Cache,
        *,
        attachment: Attachment = _NOTHING,
    ) -> tuple[jax.Array, Cache]:
        """Reads more tokens, after those of a cache.

        Args:
          batch: int32 `[B, T]` arrays `input_ids` and `attention_mask`: prompts, padded
            on the left, or one token a row.
          cache: with room for T columns more.
          attachment: what a method adds to the layers.

        Returns:
          Normed hidden states of the new columns `[B, T, D]`, and the cache with them.
        """
        is_new = batch["attention_mask"].astype(bool)
        num_new = is_new.shape[1]
        start = cache.length
        is_token = jax.lax.dynamic_update_slice_in_dim(cache.is_token, is_new, start, 1)
        positions = cache.positions[:, None] + _positions(is_new)
        columns = start + jnp.arange(num_new)
        info, seen = self.family.parts.position_info, _positions(is_token)
        context = lambda kind: (
            info(self.config, kind, positions, seen),
            Mask(_seen(kind, columns, is_token)),
        )
        x, k, v = run_cached_layers(
            self.layers,
            self.embeddings(batch["input_ids"], positions, None),
            Cached(cache.k, cache.v, start),
            *of_kinds(self.config.kinds, context),
            kinds=self.config.layer_kinds,
            attachment=attachment,
        )
        cache = Cache(
            k=k,
            v=v,
            is_token=is_token,
            positions=cache.positions + jnp.sum(is_new, axis=1, dtype=jnp.int32),
            length=start + num_new,
        )
        return self.norm(x), cache


def _mask(
    kind: LayerKind,
    reaches: tuple[Reach, ...],
    is_token: jax.Array,
    positions: jax.Array,
    batch: Inputs,
) -> Mask:
    """Returns which keys every token sees, `[B, 1, T, T]`."""
    columns = jnp.arange(is_token.shape[1])
    if "ends" in batch:
        # The branches between a token and its parent do not count as a distance.
        distance = positions[:, :, None] - positions[:, None, :]
        columns = columns[None, :, None]
        is_past = columns >= jnp.swapaxes(columns, 1, 2)
        is_open = columns < batch["ends"][:, None]
        mask = is_past & is_open & _near(kind, distance) & is_token[:, None]
        return Mask(mask[:, None])
    seen, segments = _seen(kind, columns, is_token), is_token.astype(jnp.int32)
    if "segment_ids" in batch:
        numbers = batch["segment_ids"]
        seen &= numbers[:, None, :, None] == numbers[:, None, None, :]
        # Padding has a number of its own.
        segments = jnp.where(is_token, numbers, -1)
    number = jnp.int32(reaches.index(_reach(kind)))
    return Mask(seen, segments, number, reaches)


def _reach(kind: LayerKind) -> Reach:
    """Returns how far a token sees in layers of a kind."""
    window = kind.sliding_window
    return Reach(None if window is None else window - 1, 0)


def _seen(kind: LayerKind, columns: jax.Array, is_token: jax.Array) -> jax.Array:
    """Returns which of S keys the tokens in some columns see, `[B, 1, T, S]`."""
    distance = columns[:, None] - jnp.arange(is_token.shape[1])[None]
    return _near(kind, distance)[None, None] & is_token[:, None, None, :]


def _near(kind: LayerKind, distance: jax.Array) -> jax.Array:
    """Returns whether a key is not ahead, and within the window if there is one."""
    window = kind.sliding_window
    is_near = distance >= 0
    return is_near if window is None else is_near & (distance < window)


class CausalLM(Decoder):
    """A decoder with a score for every next word.

    The leaves of the head are `lm_head/...`, unless that is tied to the words.
    """

    def __init__(
        self,
        family: DecoderFamily,
        config: DecoderConfig | ClassicConfig,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(family, config, rngs=rngs)
        sizes = (config.hidden_size, config.vocab_size)
        use_bias = family.parts.has_head_bias
        head = lambda: linear(config, *sizes, rngs, use_bias=use_bias)
        self.lm_head = None if config.tied else head()

    def __call__(
        self,
        batch: Inputs,
        *,
        key: jax.Array | None = None,
        **options: Unpack[ModelOptions],
    ) -> jax.Array:
        """Returns float32 logits `[B, T, V]`; the arguments are those of `encode`."""
        return self.logits(self.hidden(batch, key=key, **options))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits `[..., V]` of normed hidden states `[..., D]`."""
        head = self.lm_head
        words = self.embeddings.word.embedding
        kernel = words[...].T if head is None else head.kernel[...]
        scores = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        if head is not None and head.bias is not None:
            scores = scores + head.bias[...].reshape(*[1] * (scores.ndim - 1), -1)
        cap = self.config.logit_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)


def _positions(is_token: jax.Array) -> jax.Array:
    """Counts the tokens of every row from zero, padding not among them."""
    return jnp.maximum(jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1, 0)
