"""The configurations of decoders, as Hugging Face writes them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparse_jax.errors import InputError, brief, listed
from sparse_jax.models.config import (
    ClassicConfig,
    DecoderConfig,
    EncoderConfig,
    LayerKind,
    RopeScaling,
)
from sparse_jax.models.family import ClassicFamily, DecoderFamily, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "classic_config",
    "decoder_config",
    "kinds_of",
    "stop_ids",
    "their_classic_fields",
    "their_decoder_fields",
    "their_layers",
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
        "attention_dropout": "attention_dropout",
    }
)
_FULL, _SLIDING = "full_attention", "sliding_attention"
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
      InputError: if its attention or its rotary positions are of a kind that is not
        supported.
    """
    distinct, numbers = kinds_of(family, theirs, path)
    fields = {ours: getattr(theirs, name) for ours, name in _FIELDS.items()}
    fields["hidden_act"] = getattr(theirs, family.activation)
    fields["attention_dropout"] = fields["attention_dropout"] or 0.0
    heads = theirs.num_attention_heads
    groups = getattr(theirs, "num_key_value_heads", None)
    width = getattr(theirs, "head_dim", None)
    return DecoderConfig(
        **fields,
        num_kv_heads=heads if groups is None else groups,
        head_size=theirs.hidden_size // heads if width is None else width,
        kinds=distinct,
        layer_kinds=numbers,
        eos_ids=stop_ids(theirs),
        **family.fields(theirs),
    )


def kinds_of(
    family: Family | DecoderFamily, theirs: "PreTrainedConfig", path: Path
) -> tuple[tuple[LayerKind, ...], tuple[int, ...] | None]:
    """Returns the kinds of layers, and that of every layer if there are several."""
    kinds = [*map(_kind_of(family, theirs, path), _layer_types(family, theirs))]
    if family.has_layers_without_rope:
        turns = theirs.no_rope_layers[: len(kinds)]
        if len(turns) < len(kinds):
            raise InputError(
                f"`no_rope_layers` in `{path}` must have a number for each of the "
                f"{len(kinds)} layers, got {len(turns)}."
            )
        plain = {"rope_theta": None, "rope_scaling": None}
        kinds = [
            kind if turn else replace(kind, **plain)
            for kind, turn in zip(kinds, turns, strict=True)
        ]
    distinct = tuple(dict.fromkeys(kinds))
    numbers = tuple(map(distinct.index, kinds))
    return distinct, None if len(distinct) == 1 else numbers


def their_decoder_fields(
    family: DecoderFamily, config: DecoderConfig
) -> dict[str, object]:
    """Returns the fields of a transformers configuration."""
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    return {
        **fields,
        family.activation: config.hidden_act,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "eos_token_id": their_stop_ids(config.eos_ids),
        **their_layers(family, config),
        **family.their_fields(config),
    }


def stop_ids(theirs: "PreTrainedConfig") -> tuple[int, ...]:
    """Returns the ids that end a text: none, one or several."""
    stop = theirs.eos_token_id
    return tuple(stop) if isinstance(stop, list) else (stop,) * (stop is not None)


def their_stop_ids(stop: tuple[int, ...]) -> int | list[int] | None:
    """Returns the ids that end a text as transformers writes them."""
    return list(stop) if len(stop) > 1 else (stop[0] if stop else None)


def _layer_types(
    family: Family | DecoderFamily, theirs: "PreTrainedConfig"
) -> list[str]:
    """Returns the type of attention of every layer, as transformers calls it."""
    if family.windows == "some":
        return theirs.layer_types
    is_sliding = family.windows == "all" and theirs.sliding_window is not None
    return [_SLIDING if is_sliding else _FULL] * theirs.num_hidden_layers


def _kind_of(
    family: Family | DecoderFamily, theirs: "PreTrainedConfig", path: Path
) -> Callable[[str], LayerKind]:
    """Returns a function from the type of a layer to its kind."""

    @functools.cache
    def kind(type_: str) -> LayerKind:
        if type_ not in (_FULL, _SLIDING):
            raise InputError(
                f"`layer_types` in `{path}` must be of {_FULL} and {_SLIDING}, got "
                f"{brief(type_)}."
            )
        window = theirs.sliding_window if type_ == _SLIDING else None
        if type_ == _SLIDING and window is None:
            raise InputError(
                f"`layer_types` in `{path}` must be {_FULL} without a window, got "
                f"{_SLIDING}. Set `sliding_window`, and `use_sliding_window` of Qwen."
            )
        # Its configuration class also reads what older files have: `rope_theta`,
        # `rope_scaling` and, of Gemma 3, `rope_local_base_freq`.
        rope = theirs.rope_parameters
        rope = _rope(rope[type_] if family.has_rope_by_type else rope, path)
        return LayerKind(
            sliding_window=window,
            rope_theta=rope["rope_theta"],
            rope_scaling=_scaling(rope),
        )

    return kind


def their_layers(
    family: Family | DecoderFamily, config: EncoderConfig | DecoderConfig
) -> dict[str, object]:
    """Returns what a transformers configuration says of the kinds of layers."""
    names = [_FULL if x.sliding_window is None else _SLIDING for x in config.kinds]
    by_type = dict(zip(names, map(_their_rope, config.kinds), strict=True))
    turning = [kind for kind in config.kinds if kind.rope_theta is not None]
    layers = config.layer_kinds or [0] * config.num_layers
    window = max((x.sliding_window or 0 for x in config.kinds), default=0) or None
    fields: dict[str, object] = {
        "rope_parameters": by_type
        if family.has_rope_by_type
        else _their_rope((turning or config.kinds)[0])
    }
    # Of the families where some layers have one, the others keep their default.
    if family.windows == "all" or window is not None:
        fields["sliding_window"] = window
    if family.windows == "some":
        fields["layer_types"] = [names[kind] for kind in layers]
    if family.has_layers_without_rope:
        turns = [int(kind.rope_theta is not None) for kind in config.kinds]
        fields["no_rope_layers"] = [turns[kind] for kind in layers]
    return fields


def _rope(rope: object, path: Path) -> Mapping[str, Any]:
    """Returns rotary settings, with the defaults for what is absent."""
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
    needed = ("rope_theta", *_ROPES[kind])
    missing = [name for name in needed if rope.get(name) is None]
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


def _their_rope(layer: LayerKind) -> dict[str, object]:
    """Returns the rotary settings under the names of transformers 5."""
    scaling, kind = layer.rope_scaling, "default"
    if scaling is not None:
        kind = "linear" if scaling.low is None else "llama3"
    settings = {name: getattr(scaling, ours) for name, ours in _ROPES[kind].items()}
    # A model may turn nothing at all; its base is then of no use.
    theta = 10000.0 if layer.rope_theta is None else layer.rope_theta
    return {"rope_theta": theta, "rope_type": kind, **settings}


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
