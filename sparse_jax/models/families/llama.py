"""Llama, and those that differ from it in little: Mistral, Qwen, SmolLM3 and Phi-3.

References:
  Touvron et al., 2023. https://arxiv.org/abs/2302.13971
  Grattafiori et al., 2024. https://arxiv.org/abs/2407.21783
  Jiang et al., 2023. https://arxiv.org/abs/2310.06825
  Yang et al., 2024. https://arxiv.org/abs/2407.10671
  Yang et al., 2025. https://arxiv.org/abs/2505.09388
  Abdin et al., 2024. https://arxiv.org/abs/2404.14219
  Kazemnejad et al., 2023. https://arxiv.org/abs/2305.19466
"""

from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError, brief
from sparse_jax.models.config import DecoderConfig
from sparse_jax.models.family import (
    FUSED,
    GATE_UP,
    NAMES,
    DecoderFamily,
    Layout,
    heads_of,
)

__all__ = [
    "LLAMA",
    "MINISTRAL",
    "MISTRAL",
    "PHI3",
    "QWEN2",
    "QWEN3",
    "SMOLLM3",
]

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
    },
    architectures=heads_of("Llama"),
    names=NAMES,
)


MISTRAL = DecoderFamily(
    name="mistral",
    fields=lambda theirs: {},
    their_fields=lambda config: {},
    architectures=heads_of("Mistral"),
    names=NAMES,
    windows="all",
)

MINISTRAL = DecoderFamily(
    name="ministral",
    fields=lambda theirs: {},
    their_fields=lambda config: {},
    architectures=heads_of("Ministral"),
    names=NAMES,
    windows="some",
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
    },
    architectures=heads_of("Qwen3"),
    names=NAMES,
    windows="some",
)


SMOLLM3 = DecoderFamily(
    name="smollm3",
    fields=LLAMA.fields,
    their_fields=lambda config: {**LLAMA.their_fields(config), **_window_flag(config)},
    architectures=heads_of("SmolLM3"),
    names=NAMES,
    windows="some",
    has_layers_without_rope=True,
)


def _phi3_fields(theirs: Any) -> dict[str, Any]:
    """Returns what a configuration of Phi-3 says."""
    for name in ("resid_pdrop", "embd_pdrop"):
        if getattr(theirs, name):
            raise InputError(
                f"`{name}` must be 0, got {brief(getattr(theirs, name))}: Phi-3 is "
                "trained without this dropout. Set it to 0."
            )
    size = theirs.hidden_size // theirs.num_attention_heads
    size = getattr(theirs, "head_dim", None) or size
    share = theirs.rope_parameters["partial_rotary_factor"]
    return {"rotary_size": None if share == 1 else int(size * share)}


PHI3 = DecoderFamily(
    name="phi3",
    fields=_phi3_fields,
    their_fields=lambda config: {
        "partial_rotary_factor": config.turned_size / config.head_size,
    },
    architectures=heads_of("Phi3"),
    names=MappingProxyType(
        {
            **NAMES,
            **dict.fromkeys(FUSED, "model.layers.{}.self_attn.qkv_proj"),
            **dict.fromkeys(GATE_UP, "model.layers.{}.mlp.gate_up_proj"),
        }
    ),
    layout=Layout(fused=(FUSED, GATE_UP)),
    windows="all",
)
