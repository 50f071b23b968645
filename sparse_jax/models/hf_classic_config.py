"""The configuration of a decoder with layer norms in Hugging Face's words."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError, brief
from sparse_jax.models.classic_config import ClassicConfig
from sparse_jax.models.classic_family import ClassicFamily
from sparse_jax.models.hf_decoder_config import stop_ids, their_stop_ids

__all__ = ["classic_config", "their_classic_fields"]

# Ours -> theirs, where the meaning is the same.
_FIELDS = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "layer_norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
        "initializer_range": "initializer_range",
        "pad_id": "pad_token_id",
        "bos_id": "bos_token_id",
    }
)


def classic_config(family: ClassicFamily, theirs: Any, path: Path) -> ClassicConfig:
    """Translates a transformers configuration.

    Raises:
      InputError: if a field has a value that is not supported.
    """
    for name, value in family.required.items():
        if getattr(theirs, name) != value:
            raise InputError(
                f"`{name}` in `{path}` must be {value} for the model type "
                f"{family.name!r}, got {brief(getattr(theirs, name))}."
            )
    return ClassicConfig(
        **{ours: getattr(theirs, name) for ours, name in _FIELDS.items()},
        eos_ids=stop_ids(theirs),
        **family.fields(theirs),
    )


def their_classic_fields(
    family: ClassicFamily, config: ClassicConfig
) -> dict[str, Any]:
    """Returns the fields of a transformers configuration."""
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    return {
        **fields,
        "eos_token_id": their_stop_ids(config.eos_ids),
        **family.their_fields(config),
    }
