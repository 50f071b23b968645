"""Gemma: norms around an offset, scaled words; from Gemma 2 on four norms a block.

References:
  Gemma Team, 2024. https://arxiv.org/abs/2403.08295
  Gemma Team, 2024. https://arxiv.org/abs/2408.00118
  Gemma Team, 2025. https://arxiv.org/abs/2503.19786
"""

from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.models.config import DecoderConfig
from sparse_jax.models.family import NAMES, DecoderFamily, heads_of

__all__ = ["GEMMA", "GEMMA2", "GEMMA3"]


def _fields(theirs: Any) -> dict[str, Any]:
    """Returns what a configuration of any Gemma says."""
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


def _their_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns what a configuration of any Gemma says, from ours."""
    return {"attention_bias": config.qkv_bias}


GEMMA = DecoderFamily(
    name="gemma",
    fields=_fields,
    their_fields=_their_fields,
    architectures=heads_of("Gemma"),
    names=NAMES,
)

_POST_NORMED = MappingProxyType(
    {
        **NAMES,
        "layers/attention/post_norm": "model.layers.{}.post_attention_layernorm",
        "layers/mlp/norm": "model.layers.{}.pre_feedforward_layernorm",
        "layers/mlp/post_norm": "model.layers.{}.post_feedforward_layernorm",
    }
)


def _post_normed_fields(theirs: Any) -> dict[str, Any]:
    """Returns what configurations of Gemma 2 and 3 say alike."""
    return {
        **_fields(theirs),
        "has_post_norms": True,
        "query_pre_attn_scalar": theirs.query_pre_attn_scalar,
        "logit_softcap": theirs.final_logit_softcapping,
    }


def _their_post_normed_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns what configurations of Gemma 2 and 3 say alike, from ours."""
    return {
        **_their_fields(config),
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "final_logit_softcapping": config.logit_softcap,
    }


GEMMA2 = DecoderFamily(
    name="gemma2",
    fields=lambda theirs: {
        **_post_normed_fields(theirs),
        "attention_softcap": theirs.attn_logit_softcapping,
    },
    their_fields=lambda config: {
        **_their_post_normed_fields(config),
        "attn_logit_softcapping": config.attention_softcap,
    },
    architectures=heads_of("Gemma2"),
    names=_POST_NORMED,
    windows="some",
    activation="hidden_activation",
)

# transformers does not look at its `attn_logit_softcapping` either.
GEMMA3 = DecoderFamily(
    name="gemma3_text",
    fields=lambda theirs: {**_post_normed_fields(theirs), "norms_heads": True},
    their_fields=_their_post_normed_fields,
    architectures=heads_of("Gemma3Text", "Gemma3ForCausalLM"),
    names=_POST_NORMED,
    windows="some",
    has_rope_by_type=True,
    activation="hidden_activation",
)
