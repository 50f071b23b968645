"""The public models of labels and of masked words: a body and a head."""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.models.causal_lm import Decoder
from sparse_jax.models.config import ClassicConfig, DecoderConfig, EncoderConfig
from sparse_jax.models.encoder import Encoder
from sparse_jax.models.family import DecoderFamily, Family
from sparse_jax.models.modules import Inputs, layer_norm, linear, split_key
from sparse_jax.models.stack import ModelOptions

__all__ = ["DecoderClassifier", "MaskedLM", "SequenceClassifier"]


class SequenceClassifier(Encoder):
    """An encoder that scores whole sequences.

    The leaves of the head are `pooler/...`, if the family has one, and
    `classifier/...`.
    """

    def __init__(self, family: Family, config: EncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(family, config, rngs)
        self.pooler = family.pooler(config, rngs) if family.pooler else None
        self.classifier = family.classifier(config, rngs)

    def __call__(
        self,
        batch: Inputs,
        *,
        key: jax.Array | None = None,
        **options: Unpack[ModelOptions],
    ) -> jax.Array:
        """Returns float32 logits `[B, num_labels]`; one label is a regression.

        The arguments are those of `Encoder.encode`.
        """
        body_key, head_key = split_key(key, 2)
        hidden = self.encode(batch, key=body_key, **options)
        pooled = self.pool(hidden, batch["attention_mask"])
        logits = self.classifier(pooled, key=head_key)
        return logits.astype(jnp.float32)

    def pool(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns what the classifier sees `[B, D]` of hidden states `[B, T, D]`."""
        x = hidden[:, 0]
        if self.config.pooling == "mean":
            mask = mask[:, :, None].astype(hidden.dtype)
            x = jnp.sum(hidden * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
        if self.pooler is None:
            return x
        x, activation = self.pooler(x), self.family.pooler_activation
        return x if activation is None else ACTIVATIONS[activation](x)


class DecoderClassifier(Decoder):
    """A decoder that scores whole sequences: its `SequenceClassifier`.

    The leaf of the head is `classifier/kernel`.
    """

    def __init__(
        self,
        family: DecoderFamily,
        config: DecoderConfig | ClassicConfig,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(family, config, rngs=rngs)
        sizes = (config.hidden_size, config.num_labels)
        self.classifier = linear(config, *sizes, rngs, use_bias=False)

    def __call__(
        self,
        batch: Inputs,
        *,
        key: jax.Array | None = None,
        **options: Unpack[ModelOptions],
    ) -> jax.Array:
        """Returns float32 logits `[B, num_labels]` of the last token of each row.

        As in transformers, the last is the rightmost that is not `config.pad_id`. The
        arguments are those of `Decoder.encode`.
        """
        is_token = batch["attention_mask"].astype(bool)
        if self.config.pad_id is not None:
            is_token &= batch["input_ids"] != self.config.pad_id
        last = jnp.argmax(is_token * jnp.arange(is_token.shape[1])[None], axis=1)
        hidden = self.hidden(batch, key=key, **options)
        pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.classifier(pooled).astype(jnp.float32)


class LmHead(nnx.Module):
    """Scores of every word, from vectors and the word table: `[..., V]`."""

    def __init__(self, family: Family, config: EncoderConfig, rngs: nnx.Rngs):
        act, size = config.head_act or family.lm_activation, config.hidden_size
        self.activation = act or config.hidden_act
        self.dense = linear(config, size, size, rngs, use_bias=config.head_bias)
        self.norm = layer_norm(config, rngs, use_bias=config.norm_bias)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))

    def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
        """Maps `[B, T, D]` and the tied word table `[V, D]` to float32 logits."""
        x = self.norm(ACTIVATIONS[self.activation](self.dense(x)))
        scores = jnp.einsum("BTD,VD->BTV", x, words, preferred_element_type=jnp.float32)
        return scores + self.bias[None, None]


class MaskedLM(Encoder):
    """An encoder that scores the word at each position.

    The leaves of the head are `lm_head/...`; its decoder is the word table.
    """

    def __init__(self, family: Family, config: EncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(family, config, rngs)
        self.lm_head = LmHead(family, config, rngs)

    def __call__(
        self,
        batch: Inputs,
        *,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        **options: Unpack[ModelOptions],
    ) -> jax.Array:
        """Returns float32 logits `[B, T, V]`, or `[B, M, V]` at chosen positions.

        `positions` are int32 columns of the batch, `[B, M]`. The other
        arguments are those of `Encoder.encode`.
        """
        hidden = self.encode(batch, key=key, **options)
        if positions is not None:
            hidden = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        return self.lm_head(hidden, self.embeddings.word.embedding[...])
