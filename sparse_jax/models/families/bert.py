"""BERT and RoBERTa.

XLM-RoBERTa and CamemBERT are the same architecture with other words.

References:
  Devlin et al., 2018. https://arxiv.org/abs/1810.04805
  Liu et al., 2019. https://arxiv.org/abs/1907.11692
  Conneau et al., 2020. https://arxiv.org/abs/1911.02116
  Martin et al., 2020. https://arxiv.org/abs/1911.03894
"""

from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.family import Family
from sparse_jax.models.modules import dropout, linear, split_key

__all__ = [
    "BERT",
    "BERT_NAMES",
    "CAMEMBERT",
    "ROBERTA",
    "ROBERTA_NAMES",
    "XLM_ROBERTA",
    "BertClassifier",
    "bert_pooler",
    "bert_position_ids",
]


def _names(prefix: str) -> dict[str, str]:
    """Returns the modules that both have, below the prefix of the family."""
    layer = f"{prefix}.encoder.layer.{{}}"
    return {
        "embeddings/word": f"{prefix}.embeddings.word_embeddings",
        "embeddings/position": f"{prefix}.embeddings.position_embeddings",
        "embeddings/token_type": f"{prefix}.embeddings.token_type_embeddings",
        "embeddings/norm": f"{prefix}.embeddings.LayerNorm",
        "layers/attention/query": f"{layer}.attention.self.query",
        "layers/attention/key": f"{layer}.attention.self.key",
        "layers/attention/value": f"{layer}.attention.self.value",
        "layers/attention/output": f"{layer}.attention.output.dense",
        "layers/attention/norm": f"{layer}.attention.output.LayerNorm",
        "layers/mlp/up": f"{layer}.intermediate.dense",
        "layers/mlp/down": f"{layer}.output.dense",
        "layers/mlp/norm": f"{layer}.output.LayerNorm",
    }


BERT_NAMES = MappingProxyType(
    {
        **_names("bert"),
        "pooler": "bert.pooler.dense",
        "classifier": "classifier",
        "lm_head": "cls.predictions",
        "lm_head/dense": "cls.predictions.transform.dense",
        "lm_head/norm": "cls.predictions.transform.LayerNorm",
    }
)


class BertClassifier(nnx.Linear):
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


def bert_pooler(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Creates the linear map of the first token."""
    return linear(config, config.hidden_size, config.hidden_size, rngs)


def bert_position_ids(input_ids: jax.Array, pad_id: int) -> jax.Array:
    """Counts the columns of the batch from zero."""
    del pad_id
    return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)


BERT = Family(
    name="bert",
    prefix="bert",
    position_offset=lambda pad_id: 0,
    position_ids=bert_position_ids,
    pooler=bert_pooler,
    classifier=BertClassifier,
    lm_activation=None,
    lm_decoder="cls.predictions.decoder",
    architectures=MappingProxyType(
        {
            "SequenceClassifier": "BertForSequenceClassification",
            "MaskedLM": "BertForMaskedLM",
        }
    ),
    names=BERT_NAMES,
)


ROBERTA_NAMES = MappingProxyType(
    {
        **_names("roberta"),
        "classifier/dense": "classifier.dense",
        "classifier/out_proj": "classifier.out_proj",
        "lm_head": "lm_head",
        "lm_head/dense": "lm_head.dense",
        "lm_head/norm": "lm_head.layer_norm",
    }
)


class RobertaClassifier(nnx.Module):
    """Two linear maps of the first token with tanh between: `[B, num_labels]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.dropout = config.classifier_dropout
        self.dense = linear(config, config.hidden_size, config.hidden_size, rngs)
        self.out_proj = linear(config, config.hidden_size, config.num_labels, rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Maps `[B, D]` to logits."""
        first_key, second_key = split_key(key, 2)
        x = jnp.tanh(self.dense(dropout(x, self.dropout, first_key)))
        return self.out_proj(dropout(x, self.dropout, second_key))


def _roberta_position_ids(input_ids: jax.Array, pad_id: int) -> jax.Array:
    """Counts the tokens of each row from `pad_id + 1`; padding gets `pad_id`."""
    is_token = (input_ids != pad_id).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + pad_id


def _family(name: str, class_name: str) -> Family:
    """Returns a family of this architecture."""
    return Family(
        name=name,
        prefix="roberta",
        position_offset=lambda pad_id: pad_id + 1,
        position_ids=_roberta_position_ids,
        pooler=None,
        classifier=RobertaClassifier,
        lm_activation="gelu",
        lm_decoder="lm_head.decoder",
        architectures=MappingProxyType(
            {
                "SequenceClassifier": f"{class_name}ForSequenceClassification",
                "MaskedLM": f"{class_name}ForMaskedLM",
            }
        ),
        names=ROBERTA_NAMES,
    )


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
CAMEMBERT = _family("camembert", "Camembert")
