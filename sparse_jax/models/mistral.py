"""Mistral: Llama with a sliding window.

References:
  Jiang et al., 2023. https://arxiv.org/abs/2310.06825
"""

from types import MappingProxyType

from sparse_jax.models.decoder_family import NAMES, DecoderFamily

__all__ = ["MISTRAL"]

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
