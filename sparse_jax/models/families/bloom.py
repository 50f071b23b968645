"""BLOOM: normed word vectors, and scores that fall with the distance.

References:
  BigScience Workshop, 2022. https://arxiv.org/abs/2211.05100
"""

from functools import partial
from types import MappingProxyType

from sparse_jax.models.classic_decoder import (
    ClassicEmbeddings,
    ClassicLayer,
    PositionInfo,
)
from sparse_jax.models.family import FUSED, ClassicFamily, Layout, Parts, heads_of
from sparse_jax.models.modules import layer_norm
from sparse_jax.models.position_embeddings import alibi

__all__ = ["BLOOM"]

BLOOM = ClassicFamily(
    name="bloom",
    parts=Parts(
        embeddings=partial(ClassicEmbeddings, has_norm=True),
        layer=ClassicLayer,
        norm=layer_norm,
        position_info=lambda config, kind, positions, seen: PositionInfo(
            bias=alibi(config.num_heads, seen)
        ),
    ),
    layout=Layout(fused=(FUSED,), by_head=True),
    required=MappingProxyType({"apply_residual_connection_post_layernorm": False}),
    fields=lambda theirs: {
        "intermediate_size": 4 * theirs.hidden_size,
        # Nothing in the model ends there; it is the length of BLOOM's training texts.
        "max_positions": getattr(theirs, "seq_length", 2048),
        "hidden_act": "gelu_new",
        "hidden_dropout": theirs.hidden_dropout,
        "attention_dropout": theirs.attention_dropout,
    },
    their_fields=lambda config: {
        "seq_length": config.max_positions,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
    },
    architectures=heads_of("Bloom"),
    names=MappingProxyType(
        {
            "embeddings/word": "transformer.word_embeddings",
            "embeddings/norm": "transformer.word_embeddings_layernorm",
            "layers/attention/norm": "transformer.h.{}.input_layernorm",
            "layers/attention/query": "transformer.h.{}.self_attention.query_key_value",
            "layers/attention/key": "transformer.h.{}.self_attention.query_key_value",
            "layers/attention/value": "transformer.h.{}.self_attention.query_key_value",
            "layers/attention/output": "transformer.h.{}.self_attention.dense",
            "layers/mlp/norm": "transformer.h.{}.post_attention_layernorm",
            "layers/mlp/up": "transformer.h.{}.mlp.dense_h_to_4h",
            "layers/mlp/down": "transformer.h.{}.mlp.dense_4h_to_h",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "classifier": "score",
        }
    ),
    bare=r"(word_embeddings|word_embeddings_layernorm|h|ln_f)\.",
)
