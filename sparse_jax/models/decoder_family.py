"""What one family of decoders does in its own way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sparse_jax.models.decoder import DecoderLayer
from sparse_jax.models.layout import PLAIN, Layout
from sparse_jax.models.parts import Parts
from sparse_jax.models.rms_norm import RmsNorm
from sparse_jax.models.rope import turn_of
from sparse_jax.models.words import Words

__all__ = ["GATED", "NAMES", "DecoderFamily"]

NAMES = MappingProxyType(
    {
        "embeddings/word": "model.embed_tokens",
        "layers/attention/norm": "model.layers.{}.input_layernorm",
        "layers/attention/query": "model.layers.{}.self_attn.q_proj",
        "layers/attention/key": "model.layers.{}.self_attn.k_proj",
        "layers/attention/value": "model.layers.{}.self_attn.v_proj",
        "layers/attention/output": "model.layers.{}.self_attn.o_proj",
        "layers/attention/query_norm": "model.layers.{}.self_attn.q_norm",
        "layers/attention/key_norm": "model.layers.{}.self_attn.k_norm",
        "layers/mlp/norm": "model.layers.{}.post_attention_layernorm",
        "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
        "layers/mlp/up": "model.layers.{}.mlp.up_proj",
        "layers/mlp/down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "lm_head": "lm_head",
    }
)

GATED = Parts(
    embeddings=Words,
    layer=DecoderLayer,
    norm=lambda config, rngs: RmsNorm(
        config.hidden_size, config.norm_eps, config.norm_offset
    ),
    place=lambda config, positions, seen: turn_of(config, positions),
)


# Families are compared by identity, which also makes them hashable.
@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderFamily:
    """The differences between two decoders."""

    name: str  # `model_type` in a Hugging Face configuration
    # Fields of our configuration that depend on the family, from a Hugging Face one.
    fields: Callable[[Any], Mapping[str, Any]]
    # Fields of a Hugging Face configuration that depend on the family, from ours.
    their_fields: Callable[[Any], Mapping[str, Any]]
    architectures: Mapping[str, str]  # our module -> Hugging Face class
    names: Mapping[str, str]  # our module path -> Hugging Face module path
    parts: Parts = GATED
    layout: Layout = PLAIN
    prefix: str = "model"  # what a bare model's tensors lack in front
    bare: str = r"(embed_tokens|layers|norm)\."  # how the names of such tensors begin
