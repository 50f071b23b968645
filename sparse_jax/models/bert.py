"""BERT: positions from zero, a pooler below the classifier.

References:
  Devlin et al., 2018. https://arxiv.org/abs/1810.04805
"""

from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.dropout import dropout
from sparse_jax.models.family import Family
from sparse_jax.models.linear import linear

__all__ = ["BERT", "NAMES"]

NAMES = MappingProxyType(
    {
        "embeddings/word": "bert.embeddings.word_embeddings",
        "embeddings/position": "bert.embeddings.position_embeddings",
        "embeddings/token_type": "bert.embeddings.token_type_embeddings",
        "embeddings/norm": "bert.embeddings.LayerNorm",
        "layers/attention/query": "bert.encoder.layer.{}.attention.self.query",
        "layers/attention/key": "bert.encoder.layer.{}.attention.self.key",
        "layers/attention/value": "bert.encoder.layer.{}.attention.self.value",
        "layers/attention/output": "bert.encoder.layer.{}.attention.output.dense",
        "layers/attention/norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "layers/mlp/up": "bert.encoder.layer.{}.intermediate.dense",
        "layers/mlp/down": "bert.encoder.layer.{}.output.dense",
        "layers/mlp/norm": "bert.encoder.layer.{}.output.LayerNorm",
        "pooler": "bert.pooler.dense",
        "classifier": "classifier",
        "lm_head": "cls.predictions",
        "lm_head/dense": "cls.predictions.transform.dense",
        "lm_head/norm": "cls.predictions.transform.LayerNorm",
    }
)


class Classifier(nnx.Linear):
    """A linear map of the pooled vector, with dropout: `[B, num_labels]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.initializer_range)
        size = config.hidden_size
        super().__init__(size, config.num_labels, kernel_init=init, rngs=rngs)
        self.dropout = config.classifier_dropout

    def __call__(
        self, inputs: jax.Array, out_sharding=None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Maps `[B, D]` to logits."""
        return super().__call__(dropout(inputs, self.dropout, key), out_sharding)


def _pooler(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Creates the linear map of the first token."""
    return linear(config, config.hidden_size, config.hidden_size, rngs)


def _position_ids(input_ids: jax.Array, pad_id: int) -> jax.Array:
    """Counts the columns of the batch from zero."""
    del pad_id
    return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)


BERT = Family(
    name="bert",
    prefix="bert",
    position_offset=lambda pad_id: 0,
    position_ids=_position_ids,
    pooler=_pooler,
    classifier=Classifier,
    lm_activation=None,
    architectures=MappingProxyType(
        {
            "SequenceClassifier": "BertForSequenceClassification",
            "MaskedLM": "BertForMaskedLM",
        }
    ),
    names=NAMES,
)
