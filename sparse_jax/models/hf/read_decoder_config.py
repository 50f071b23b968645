"""The configurations of decoders, as Hugging Face writes them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparse_jax.errors import InputError, brief, listed
from sparse_jax.models.config import ClassicConfig, DecoderConfig, RopeScaling
from sparse_jax.models.family import ClassicFamily, DecoderFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "classic_config",
    "decoder_config",
    "stop_ids",
    "their_classic_fields",
    "their_decoder_fields",
    "their_stop_ids",
]

# Ours -> theirs, where the meaning is the same.
_SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "tied": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
}
_FIELDS = MappingProxyType(
    {
        **_SHARED,
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "hidden_act": "hidden_act",
        "attention_dropout": "attention_dropout",
    }
)
_CLASSIC_FIELDS = MappingProxyType({**_SHARED, "layer_norm_eps": "layer_norm_epsilon"})
# kind -> their settings and ours
_ROPES = MappingProxyType(
    {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low",
            "high_freq_factor": "high",
            "original_max_position_embeddings": "original_positions",
        },
    }
)


def decoder_config(
    family: DecoderFamily, theirs: "PreTrainedConfig", path: Path
) -> DecoderConfig:
    """Translates a transformers configuration.

    Raises:
      InputError: if its rotary positions are of a kind that is not supported.
    """
    rope = _rope(theirs, path)
    fields = {ours: getattr(theirs, name) for ours, name in _FIELDS.items()}
    fields["attention_dropout"] = fields["attention_dropout"] or 0.0
    heads = theirs.num_attention_heads
    groups = getattr(theirs, "num_key_value_heads", None)
    width = getattr(theirs, "head_dim", None)
    return DecoderConfig(
        **fields,
        num_kv_heads=heads if groups is None else groups,
        head_size=theirs.hidden_size // heads if width is None else width,
        rope_theta=rope["rope_theta"],
        rope_scaling=_scaling(rope),
        eos_ids=stop_ids(theirs),
        **family.fields(theirs),
    )


def their_decoder_fields(
    family: DecoderFamily, config: DecoderConfig
) -> dict[str, object]:
    """Returns the fields of a transformers configuration."""
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    return {
        **fields,
        "num_key_value_heads": config.num_kv_heads,
        "rope_parameters": _their_rope(config),
        "eos_token_id": their_stop_ids(config.eos_ids),
        **family.their_fields(config),
    }


def stop_ids(theirs: "PreTrainedConfig") -> tuple[int, ...]:
    """Returns the ids that end a text: none, one or several."""
    stop = theirs.eos_token_id
    return tuple(stop) if isinstance(stop, list) else (stop,) * (stop is not None)


def their_stop_ids(stop: tuple[int, ...]) -> int | list[int] | None:
    """Returns the ids that end a text as transformers writes them."""
    return list(stop) if len(stop) > 1 else (stop[0] if stop else None)


def _rope(theirs: "PreTrainedConfig", path: Path) -> Mapping[str, Any]:
    """Returns the rotary settings under the names of transformers 5."""
    # Its configuration class also reads `rope_theta` and `rope_scaling` of older files.
    rope = theirs.rope_parameters
    if not isinstance(rope, Mapping):
        raise InputError(
            f"`rope_parameters` in `{path}` must be an object, got {brief(rope)}."
        )
    by_kind = [name for name in rope if isinstance(rope[name], Mapping)]
    if by_kind:
        raise InputError(
            f"`rope_parameters` in `{path}` must be the same for all layers, got "
            f"{listed(by_kind)}."
        )
    rope = {"rope_theta": 10000.0, "rope_type": "default", **rope}
    kind, share = rope["rope_type"], rope.get("partial_rotary_factor")
    if not isinstance(kind, str) or kind not in _ROPES:
        raise InputError(
            f"`rope_type` in `{path}` must be one of {', '.join(_ROPES)}, got "
            f"{brief(kind)}."
        )
    # That of the default kind is not looked at in transformers either.
    if kind != "default" and share not in (None, 1):
        raise InputError(
            f"`partial_rotary_factor` in `{path}` must be 1, got {brief(share)}."
        )
    missing = [name for name in _ROPES[kind] if rope.get(name) is None]
    if missing:
        raise InputError(
            f"`rope_parameters` in `{path}` must have {listed(missing)} for the type "
            f"{kind!r}, and does not. Copy the file that belongs to the model again."
        )
    return rope


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    """Returns how frequencies are stretched."""
    fields = _ROPES[rope["rope_type"]]
    scaling = {ours: rope[name] for name, ours in fields.items()}
    return RopeScaling(**scaling) if scaling else None


def _their_rope(config: DecoderConfig) -> dict[str, object]:
    """Returns the rotary settings under the names of transformers 5."""
    scaling, kind = config.rope_scaling, "default"
    if scaling is not None:
        kind = "linear" if scaling.low is None else "llama3"
    settings = {name: getattr(scaling, ours) for name, ours in _ROPES[kind].items()}
    return {"rope_theta": config.rope_theta, "rope_type": kind, **settings}


def classic_config(
    family: ClassicFamily, theirs: "PreTrainedConfig", path: Path
) -> ClassicConfig:
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
        **{ours: getattr(theirs, name) for ours, name in _CLASSIC_FIELDS.items()},
        eos_ids=stop_ids(theirs),
        **family.fields(theirs),
    )


def their_classic_fields(
    family: ClassicFamily, config: ClassicConfig
) -> dict[str, object]:
    """Returns the fields of a transformers configuration."""
    fields = {theirs: getattr(config, ours) for ours, theirs in _CLASSIC_FIELDS.items()}
    return {
        **fields,
        "eos_token_id": their_stop_ids(config.eos_ids),
        **family.their_fields(config),
    }
