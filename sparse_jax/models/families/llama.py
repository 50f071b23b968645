"""Llama, and those that differ from it in little: Mistral, Qwen and Gemma.

References:
  Touvron et al., 2023. https://arxiv.org/abs/2302.13971
  Grattafiori et al., 2024. https://arxiv.org/abs/2407.21783
  Jiang et al., 2023. https://arxiv.org/abs/2310.06825
  Yang et al., 2024. https://arxiv.org/abs/2407.10671
  Yang et al., 2025. https://arxiv.org/abs/2505.09388
  Gemma Team, 2024. https://arxiv.org/abs/2403.08295
"""

from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError, brief
from sparse_jax.models.family import NAMES, DecoderFamily

__all__ = ["GEMMA", "LLAMA", "MISTRAL", "QWEN2", "QWEN3"]

LLAMA = DecoderFamily(
    name="llama",
    fields=lambda theirs: {
        "qkv_bias": theirs.attention_bias,
        "output_bias": theirs.attention_bias,
        "mlp_bias": theirs.mlp_bias,
    },
    their_fields=lambda config: {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "head_dim": config.head_size,
    },
    architectures=MappingProxyType({"CausalLM": "LlamaForCausalLM"}),
    names=NAMES,
)


MISTRAL = DecoderFamily(
    name="mistral",
    fields=lambda theirs: {"sliding_window": theirs.sliding_window},
    their_fields=lambda config: {
        "sliding_window": config.sliding_window,
        "head_dim": config.head_size,
    },
    architectures=MappingProxyType({"CausalLM": "MistralForCausalLM"}),
    names=NAMES,
)


def _require_full_attention(theirs: Any) -> None:
    """Raises if some layers have a sliding window."""
    kinds = [kind for kind in theirs.layer_types if kind != "full_attention"]
    if kinds:
        raise InputError(
            "`layer_types` must be full_attention throughout, got "
            f"{brief(kinds[0])}. Windows in some layers only are not supported: set "
            "`use_sliding_window` to false."
        )


def _fields2(theirs: Any) -> dict[str, Any]:
    """Returns what a configuration of Qwen2 says."""
    _require_full_attention(theirs)
    return {"qkv_bias": True}


def _fields3(theirs: Any) -> dict[str, Any]:
    """Returns what a configuration of Qwen3 says."""
    _require_full_attention(theirs)
    bias = theirs.attention_bias
    return {"norms_heads": True, "qkv_bias": bias, "output_bias": bias}


QWEN2 = DecoderFamily(
    name="qwen2",
    fields=_fields2,
    their_fields=lambda config: {},
    architectures=MappingProxyType({"CausalLM": "Qwen2ForCausalLM"}),
    names=NAMES,
)

QWEN3 = DecoderFamily(
    name="qwen3",
    fields=_fields3,
    their_fields=lambda config: {
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_size,
    },
    architectures=MappingProxyType({"CausalLM": "Qwen3ForCausalLM"}),
    names=NAMES,
)


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
