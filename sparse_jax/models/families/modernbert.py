"""ModernBERT: rotary positions, windows in most layers, and a gated MLP.

References:
  Warner et al., 2024. https://arxiv.org/abs/2412.13663
"""

from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError, brief
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import BertClassifier, bert_position_ids
from sparse_jax.models.family import FUSED, GATE_UP, Family, Layout
from sparse_jax.models.prenorm_encoder import PRENORM, NormedHead

__all__ = ["MODERNBERT"]

_LAYER = "model.layers.{}"
_SAME = MappingProxyType(
    {
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "norm_bias": "norm_bias",
        "head_bias": "classifier_bias",
        "head_act": "classifier_activation",
        "pooling": "classifier_pooling",
    }
)


def _fields(theirs: Any) -> dict[str, Any]:
    """Returns what only configurations of ModernBERT say."""
    for name, value in (("embedding_dropout", 0), ("decoder_bias", True)):
        if getattr(theirs, name) != value:
            raise InputError(
                f"`{name}` must be {value}, got {brief(getattr(theirs, name))}."
            )
    return {ours: getattr(theirs, name) for ours, name in _SAME.items()}


def _their_fields(config: EncoderConfig) -> dict[str, Any]:
    """Returns what only configurations of ModernBERT say, from ours."""
    windows = [2 * (kind.sliding_window or 0) for kind in config.kinds]
    fields = {name: getattr(config, ours) for ours, name in _SAME.items()}
    return fields | ({"local_attention": max(windows)} if any(windows) else {})


MODERNBERT = Family(
    name="modernbert",
    prefix="model",
    position_offset=lambda pad_id: 0,
    position_ids=bert_position_ids,
    pooler=NormedHead,
    pooler_activation=None,
    classifier=BertClassifier,
    lm_activation=None,
    lm_decoder="decoder",
    architectures=MappingProxyType(
        {
            "SequenceClassifier": "ModernBertForSequenceClassification",
            "MaskedLM": "ModernBertForMaskedLM",
        }
    ),
    names=MappingProxyType(
        {
            "embeddings/word": "model.embeddings.tok_embeddings",
            "embeddings/norm": "model.embeddings.norm",
            "layers/attention/norm": f"{_LAYER}.attn_norm",
            **dict.fromkeys(FUSED, f"{_LAYER}.attn.Wqkv"),
            "layers/attention/output": f"{_LAYER}.attn.Wo",
            "layers/mlp/norm": f"{_LAYER}.mlp_norm",
            **dict.fromkeys(GATE_UP, f"{_LAYER}.mlp.Wi"),
            "layers/mlp/down": f"{_LAYER}.mlp.Wo",
            "norm": "model.final_norm",
            "pooler/dense": "head.dense",
            "pooler/norm": "head.norm",
            "classifier": "classifier",
            "lm_head": "decoder",
            "lm_head/dense": "head.dense",
            "lm_head/norm": "head.norm",
        }
    ),
    renamed=MappingProxyType(
        {
            "hidden_act": "hidden_activation",
            "hidden_dropout_prob": "mlp_dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "layer_norm_eps": "norm_eps",
        }
    ),
    constants=MappingProxyType({"type_vocab_size": 0}),
    fields=_fields,
    their_fields=_their_fields,
    body=PRENORM,
    layout=Layout(fused=(FUSED, GATE_UP)),
    absent=("layers/attention/norm/scale", "layers/attention/norm/bias"),
    bare=r"(embeddings|layers|final_norm)\.",
    windows="some",
    has_rope_by_type=True,
)
