"""Llama, and those that differ from it in little: Mistral and Qwen.

References:
  Touvron et al., 2023. https://arxiv.org/abs/2302.13971
  Grattafiori et al., 2024. https://arxiv.org/abs/2407.21783
  Jiang et al., 2023. https://arxiv.org/abs/2310.06825
  Yang et al., 2024. https://arxiv.org/abs/2407.10671
  Yang et al., 2025. https://arxiv.org/abs/2505.09388
"""

from typing import Any

from sparse_jax.models.config import DecoderConfig
from sparse_jax.models.family import NAMES, DecoderFamily, heads_of

__all__ = ["LLAMA", "MISTRAL", "QWEN2", "QWEN3"]

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
    architectures=heads_of("Llama"),
    names=NAMES,
)


MISTRAL = DecoderFamily(
    name="mistral",
    fields=lambda theirs: {},
    their_fields=lambda config: {"head_dim": config.head_size},
    architectures=heads_of("Mistral"),
    names=NAMES,
    windows="all",
)


def _window_flag(config: DecoderConfig) -> dict[str, Any]:
    """Returns what says in a configuration of Qwen whether its window is of use."""
    has_window = any(kind.sliding_window is not None for kind in config.kinds)
    return {"use_sliding_window": has_window}


QWEN2 = DecoderFamily(
    name="qwen2",
    fields=lambda theirs: {"qkv_bias": True},
    their_fields=_window_flag,
    architectures=heads_of("Qwen2"),
    names=NAMES,
    windows="some",
)

QWEN3 = DecoderFamily(
    name="qwen3",
    fields=lambda theirs: {
        "norms_heads": True,
        "qkv_bias": theirs.attention_bias,
        "output_bias": theirs.attention_bias,
    },
    their_fields=lambda config: {
        **_window_flag(config),
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_size,
    },
    architectures=heads_of("Qwen3"),
    names=NAMES,
    windows="some",
)
