"""Gemma: scaled word vectors, norms that add one to their scale.

References:
  Gemma Team, 2024. https://arxiv.org/abs/2403.08295
"""

from types import MappingProxyType

from sparse_jax.models.decoder_family import NAMES, DecoderFamily

__all__ = ["GEMMA"]

GEMMA = DecoderFamily(
    name="gemma",
    fields=lambda theirs: {
        "norm_offset": 1.0,
        "scales_words": True,
        "qkv_bias": theirs.attention_bias,
        "output_bias": theirs.attention_bias,
    },
    their_fields=lambda config: {
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_size,
    },
    architectures=MappingProxyType({"CausalLM": "GemmaForCausalLM"}),
    names=NAMES,
)
