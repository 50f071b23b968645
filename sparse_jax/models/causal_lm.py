"""Decoders, and one that scores the next word."""

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.attachment import Arrays, Attachment
from sparse_jax.models.attend import Mask, Reach, keys_first
from sparse_jax.models.cached import KeysValues
from sparse_jax.models.config import ClassicConfig, DecoderConfig, LayerKind
from sparse_jax.models.family import DecoderFamily
from sparse_jax.models.modules import Inputs, linear
from sparse_jax.models.stack import (
    LayerOptions,
    ModelOptions,
    of_kinds,
    run_cached_layers,
    run_layers,
    run_reading_layers,
    stack_layers,
)
from sparse_jax.params.axes import is_one_cpu

__all__ = ["Cache", "CausalLM", "Decoder"]

_NOTHING = Attachment()
# As many tokens as `keys_first` is for: 32 rows of four beams.
_FEW_ROWS = 128


class Cache(NamedTuple):
    """What a model remembers of the tokens it has read; S columns of room."""

    # Of all layers in one, shape=(L, B, G, S, K), or of each, shape=(B, G, S, K).
    kept: tuple[KeysValues, ...]
    is_token: jax.Array  # shape=(B, S), bool: False at padding and in front of the end
    positions: jax.Array  # shape=(B,), int32: tokens read, which number the next one
    length: jax.Array  # shape=(), int32: columns in use

    def apart(self) -> "Cache":
        """Returns the cache with each layer on its own."""
        ((k, v),) = self.kept
        return self._replace(kept=tuple(map(KeysValues, k, v)))


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
        positions, context = self._context(batch)
        return run_layers(
            self.layers,
            self.embeddings(batch["input_ids"], positions, key, noise),
            *context,
            kinds=self.config.layer_kinds,
            key=key,
            **options,
        )

    def _context(self, batch: Inputs) -> tuple[jax.Array, tuple]:
        """Returns the positions of tokens, and what the layers know of them."""
        is_token = batch["attention_mask"].astype(bool)
        positions = batch.get("positions", _positions(is_token))
        info = self.family.parts.position_info
        reaches = tuple(_reach(kind) for kind in self.config.kinds)
        context = lambda kind: (
            info(self.config, kind, positions, positions),
            _mask(kind, reaches, is_token, positions, batch),
        )
        return positions, of_kinds(self.config.kinds, context)

    def cache(self, batch_size: int, length: int) -> Cache:
        """Returns an empty cache for `length` columns of tokens and padding."""
        config = self.config
        dtype = self.embeddings.word.embedding[...].dtype
        shape = (
            config.num_layers, batch_size, config.num_kv_heads, length, config.head_size
        )  # fmt: skip
        return Cache(
            kept=(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),),
            is_token=jnp.zeros((batch_size, length), bool),
            positions=jnp.zeros(batch_size, jnp.int32),
            length=jnp.zeros([], jnp.int32),
        )

    def read(
        self,
        batch: Inputs,
        cache: Cache,
        *,
        attachment: Attachment = _NOTHING,
    ) -> tuple[jax.Array, Cache]:
        """Reads prompts into an empty cache.

        Args:
          batch: as of `extend`.
          cache: empty, with room for T columns and more.
          attachment: what a method adds to the layers.

        Returns:
          Normed hidden states `[B, T, D]`, and the cache with the prompts.
        """
        positions, context = self._context(batch)
        x, new = run_reading_layers(
            self.layers,
            self.embeddings(batch["input_ids"], positions, None),
            *context,
            kinds=self.config.layer_kinds,
            attachment=attachment,
        )
        is_new = batch["attention_mask"].astype(bool)
        ((k, v),) = cache.kept
        write = lambda old, new: jax.lax.dynamic_update_slice(
            old, jnp.swapaxes(new, 2, 3).astype(old.dtype), (0,) * old.ndim
        )
        front = jax.lax.dynamic_update_slice(cache.is_token, is_new, (0, 0))
        cache = Cache(
            kept=(KeysValues(write(k, new.k), write(v, new.v)),),
            is_token=front,
            positions=jnp.sum(is_new, axis=1, dtype=jnp.int32),
            length=jnp.int32(is_new.shape[1]),
        )
        return self.norm(x), cache

    def extend(
        self,
        batch: Inputs,
        cache: Cache,
        *,
        attachment: Attachment = _NOTHING,
        parts: Sequence[Arrays] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads more tokens, after those of a cache.

        Args:
          batch: int32 `[B, T]` arrays `input_ids` and `attention_mask`: prompts, padded
            on the left, or one token a row.
          cache: with room for T columns more.
          attachment: what a method adds to the layers.
          parts: parameters of every layer, of a cache whose layers are apart.

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
        x, kept = run_cached_layers(
            self.layers,
            self.embeddings(batch["input_ids"], positions, None),
            cache.kept,
            start,
            *of_kinds(self.config.kinds, context),
            kinds=self.config.layer_kinds,
            attachment=attachment,
            parts=parts,
        )
        cache = Cache(
            kept=kept,
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
        is_few = hidden.ndim == 2 and len(hidden) <= _FEW_ROWS
        if head is None and is_few and is_one_cpu():
            scores = keys_first(words[...], hidden)
        else:
            scores = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        if head is not None and head.bias is not None:
            scores = scores + head.bias[...].reshape(*[1] * (scores.ndim - 1), -1)
        cap = self.config.logit_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)


def _positions(is_token: jax.Array) -> jax.Array:
    """Counts the tokens of every row from zero, padding not among them."""
    return jnp.maximum(jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1, 0)
