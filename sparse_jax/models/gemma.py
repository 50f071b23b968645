"""Gemma: scaled word vectors, norms that add one to their scale.

References:
  Gemma Team, 2024. https://arxiv.org/abs/2403.08295
"""

from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.models.decoder_family import NAMES, DecoderFamily

__all__ = ["GEMMA"]


def _fields(theirs: Any) -> dict[str, Any]:
    """Returns what a configuration of Gemma says."""
    if theirs.use_bidirectional_attention:
        raise InputError(
            "`use_bidirectional_attention` must be false, got true: a decoder sees the "
            "tokens before each only."
        )
    return {
        "norm_offset": 1.0,
        "scales_words": True,
        "qkv_bias": theirs.attention_bias,
        "output_bias": theirs.attention_bias,
    }


GEMMA = DecoderFamily(
    name="gemma",
    fields=_fields,
    their_fields=lambda config: {
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_size,
    },
    architectures=MappingProxyType({"CausalLM": "GemmaForCausalLM"}),
    names=NAMES,
)
