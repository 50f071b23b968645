"""Llama 1, 2 and 3.

References:
  Touvron et al., 2023. https://arxiv.org/abs/2302.13971
  Grattafiori et al., 2024. https://arxiv.org/abs/2407.21783
"""

from types import MappingProxyType

from sparse_jax.models.decoder_family import NAMES, DecoderFamily

__all__ = ["LLAMA"]

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
