"""Qwen2, whose queries, keys and values have biases, and Qwen3, which norms heads.

References:
  Yang et al., 2024. https://arxiv.org/abs/2407.10671
  Yang et al., 2025. https://arxiv.org/abs/2505.09388
"""

from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError, brief
from sparse_jax.models.decoder_family import NAMES, DecoderFamily

__all__ = ["QWEN2", "QWEN3"]


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
