"""DistilBERT: BERT without token types, and its pooler under a ReLU.

References:
  Sanh et al., 2019. https://arxiv.org/abs/1910.01108
"""

from types import MappingProxyType

from sparse_jax.models.families.bert import (
    BertClassifier,
    bert_pooler,
    bert_position_ids,
)
from sparse_jax.models.family import Family

__all__ = ["DISTILBERT"]

_LAYER = "distilbert.transformer.layer.{}"

DISTILBERT = Family(
    name="distilbert",
    prefix="distilbert",
    position_offset=lambda pad_id: 0,
    position_ids=bert_position_ids,
    pooler=bert_pooler,
    pooler_activation="relu",
    classifier=BertClassifier,
    lm_activation=None,
    lm_decoder="vocab_projector",
    architectures=MappingProxyType(
        {
            "SequenceClassifier": "DistilBertForSequenceClassification",
            "MaskedLM": "DistilBertForMaskedLM",
        }
    ),
    names=MappingProxyType(
        {
            "embeddings/word": "distilbert.embeddings.word_embeddings",
            "embeddings/position": "distilbert.embeddings.position_embeddings",
            "embeddings/norm": "distilbert.embeddings.LayerNorm",
            "layers/attention/query": f"{_LAYER}.attention.q_lin",
            "layers/attention/key": f"{_LAYER}.attention.k_lin",
            "layers/attention/value": f"{_LAYER}.attention.v_lin",
            "layers/attention/output": f"{_LAYER}.attention.out_lin",
            "layers/attention/norm": f"{_LAYER}.sa_layer_norm",
            "layers/mlp/up": f"{_LAYER}.ffn.lin1",
            "layers/mlp/down": f"{_LAYER}.ffn.lin2",
            "layers/mlp/norm": f"{_LAYER}.output_layer_norm",
            "pooler": "pre_classifier",
            "classifier": "classifier",
            "lm_head": "vocab_projector",
            "lm_head/dense": "vocab_transform",
            "lm_head/norm": "vocab_layer_norm",
        }
    ),
    renamed=MappingProxyType(
        {
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "classifier_dropout": "seq_classif_dropout",
        }
    ),
    constants=MappingProxyType(
        {"type_vocab_size": 0, "layer_norm_eps": 1e-12, "output_dropout": 0.0}
    ),
    bare=r"(embeddings|transformer)\.",
)
