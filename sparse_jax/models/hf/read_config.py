"""Hugging Face `config.json`, in and out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import jax.numpy as jnp
import jax.typing

from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.config_checks import MOST_LAYERS, MOST_SIZE, is_size
from sparse_jax.models.families.bert import BERT, CAMEMBERT, ROBERTA, XLM_ROBERTA
from sparse_jax.models.families.bloom import BLOOM
from sparse_jax.models.families.distilbert import DISTILBERT
from sparse_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from sparse_jax.models.families.gpt2 import GPT2
from sparse_jax.models.families.gptj import GPTJ
from sparse_jax.models.families.llama import (
    LLAMA,
    MINISTRAL,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from sparse_jax.models.families.modernbert import MODERNBERT
from sparse_jax.models.family import ClassicFamily, DecoderFamily, Family
from sparse_jax.models.functional import Model
from sparse_jax.models.hf.model_files import read_object, require_no_peft
from sparse_jax.models.hf.read_decoder_config import (
    classic_config,
    decoder_config,
    kinds_of,
    their_classic_fields,
    their_decoder_fields,
    their_layers,
)
from sparse_jax.models.modules import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["FAMILIES", "read_config", "write_config"]

FAMILIES = MappingProxyType(
    {
        family.name: family
        for family in (
            BERT,
            ROBERTA,
            XLM_ROBERTA,
            CAMEMBERT,
            DISTILBERT,
            MODERNBERT,
            LLAMA,
            MISTRAL,
            MINISTRAL,
            QWEN2,
            QWEN3,
            GEMMA,
            GEMMA2,
            GEMMA3,
            PHI3,
            SMOLLM3,
            GPT2,
            GPTJ,
            BLOOM,
        )  # fmt: skip
    }
)

# Ours -> theirs, where the meaning is the same.
_FIELDS = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "type_vocab_size": "type_vocab_size",
        "layer_norm_eps": "layer_norm_eps",
        "hidden_act": "hidden_act",
        "hidden_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "classifier_dropout": "classifier_dropout",
        "initializer_range": "initializer_range",
    }
)
# Sizes that all files have, under these or the family's own names.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_MOST_LABELS = 2**20  # transformers makes a name for each
_QUANTIZED = ("quantization_config", "compression_config")
# Of BLOOM, which no map of names has.
_OLD_NAMES = {"hidden_size": ("n_embed",)}


def read_config(
    folder: str | Path, *, num_labels: int | None = None
) -> tuple[Family | DecoderFamily, Config]:
    """Reads the family and the sizes of the model in a folder.

    Args:
      folder: folder with a `config.json`, of any transformers version.
      num_labels: labels of the head; None takes those of the file.

    Raises:
      InputError: if the file is absent, is not JSON, lacks a size, has a field of a
        wrong type or range, names a model type that is not supported, describes an
        encoder without absolute positions, or belongs to quantized weights.
    """
    path = Path(folder) / "config.json"
    fields = _fields_in(path)
    family = _family_of(fields, path)
    _check_sizes(fields, family, path)
    theirs = _their_config(fields, family, path)
    try:
        if isinstance(family, ClassicFamily):
            config = classic_config(family, theirs, path)
        elif isinstance(family, DecoderFamily):
            config = decoder_config(family, theirs, path)
        else:
            _require_encoder(path, theirs)
            config = _encoder_config(family, theirs, path)
        return family, _with_labels(config, theirs, num_labels)
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(
            f"`{path}` must be a valid {family.name} configuration: {error}"
        ) from error


def write_config(
    model: Model, folder: Path, dtype: jax.typing.DTypeLike = jnp.float32
) -> None:
    """Writes a `config.json` that transformers reads."""
    from transformers import AutoConfig

    config, family = model.config, model.family
    shared = {
        "architectures": [family.architectures[model.head.__name__]],
        "dtype": jnp.dtype(dtype).name,
        **_their_labels(config),
    }
    if isinstance(family, DecoderFamily):
        if isinstance(family, ClassicFamily):
            fields = their_classic_fields(family, config)
        else:
            fields = their_decoder_fields(family, config)
        AutoConfig.for_model(family.name, **fields, **shared).save_pretrained(folder)
        return
    theirs = AutoConfig.for_model(
        family.name,
        **{theirs: getattr(config, ours) for ours, theirs in _fields(family).items()},
        **(their_layers(family, config) if family.windows == "some" else {}),
        **family.their_fields(config),
        max_position_embeddings=config.max_positions + config.position_offset,
        pad_token_id=config.pad_id,
        **shared,
    )
    theirs.save_pretrained(folder)


def _fields_in(path: Path) -> dict[str, object]:
    """Returns what a configuration file says, without what nobody here asks for."""
    require_no_peft("model", path.parent)
    if not path.is_file():
        raise InputError(
            f"`model` must be a folder with a `config.json`, got `{path.parent}`. "
            "Save a model there with `save_pretrained`."
        )
    fields = read_object(path)
    quantized = next((name for name in _QUANTIZED if fields.get(name)), None)
    if quantized is not None:
        raise InputError(
            f"`{quantized}` must not be in `{path}`: quantized weights are not read. "
            "Pass the checkpoint that was quantized, or load this one in transformers "
            "and save what `dequantize()` returns."
        )
    # The dtype of parameters is asked for by whoever loads them.
    return {
        name: fields[name] for name in fields if name not in ("dtype", "torch_dtype")
    }


def _family_of(fields: Mapping[str, object], path: Path) -> Family | DecoderFamily:
    """Returns the family that a configuration names."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"`model_type` in `{path}` must be one of {', '.join(sorted(FAMILIES))}, "
            f"got {brief(model_type)}. Other architectures are not read."
        )
    return FAMILIES[model_type]


def _check_sizes(
    fields: Mapping[str, object], family: Family | DecoderFamily, path: Path
) -> None:
    """Raises unless a file has the sizes, for which transformers has defaults."""
    # transformers takes seconds to import, so it is imported where it is used.
    from transformers import CONFIG_MAPPING

    own_names = {**CONFIG_MAPPING[family.name].attribute_map, **_renamed(family)}
    more = () if isinstance(family, ClassicFamily) else ("intermediate_size",)
    for name in (*_SIZES, *more):
        words = (own_names.get(name, name), name, *_OLD_NAMES.get(name, ()))
        found = [word for word in dict.fromkeys(words) if word in fields]
        if not found:
            raise InputError(
                f"`{words[0]}` must be in `{path}`, and is not. Copy the file that "
                "belongs to the model again."
            )
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST_SIZE
        for word in found:
            _check_size(word, fields[word], path, most)
    for alias, name in own_names.items():
        if alias in fields and name in fields and fields[alias] != fields[name]:
            raise InputError(
                f"`{name}` and `{alias}` in `{path}` must be the same, got "
                f"{brief(fields[name])} and {brief(fields[alias])}."
            )
    if fields.get("num_labels") is not None:
        _check_size("num_labels", fields["num_labels"], path, _MOST_LABELS)
    names = fields.get("id2label")
    is_named = isinstance(names, dict) and all(
        isinstance(name, str) for name in names.values()
    )
    if names is not None and not is_named:
        raise InputError(
            f"`id2label` in `{path}` must be an object from numbers to names, got "
            f"{brief(names)}. Copy the file that belongs to the model again."
        )


def _check_size(name: str, value: object, path: Path, most: int) -> None:
    """Raises unless a value is a size."""
    if not is_size(value, most):
        raise InputError(
            f"`{name}` in `{path}` must be a positive whole number of at most {most}, "
            f"got {brief(value)}."
        )


def _their_config(
    fields: Mapping[str, object], family: Family | DecoderFamily, path: Path
) -> "PreTrainedConfig":
    """Returns the configuration of transformers, its defaults for what is absent."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[family.name].from_dict(dict(fields))
    # Fields of a wrong type raise nearly anything in there.
    except Exception as error:
        raise InputError(
            f"`{path}` must be a valid {family.name} configuration: {reason_of(error)}."
        ) from error


def _require_encoder(path: Path, theirs: "PreTrainedConfig") -> None:
    """Raises unless the model is an encoder with absolute positions."""
    positions = getattr(theirs, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise InputError(
            f"`position_embedding_type` in `{path}` must be 'absolute', "
            f"got {brief(positions)}."
        )
    # DistilBERT has neither.
    if any(getattr(theirs, name, 0) for name in ("is_decoder", "add_cross_attention")):
        raise InputError(
            f"`is_decoder` and `add_cross_attention` in `{path}` must be false: "
            "these models read a sequence in both directions."
        )


def _encoder_config(
    family: Family, theirs: "PreTrainedConfig", path: Path
) -> EncoderConfig:
    """Translates a transformers configuration."""
    pad_id = theirs.pad_token_id
    if pad_id is None and family.position_offset(0):
        raise InputError(
            "`pad_token_id` must be a number, got null: positions are counted from it."
        )
    pad_id = 0 if pad_id is None else pad_id
    offset = family.position_offset(pad_id)
    fields = {ours: getattr(theirs, name) for ours, name in _fields(family).items()}
    if fields["classifier_dropout"] is None:
        fields["classifier_dropout"] = theirs.hidden_dropout_prob
    layers = {}
    if family.windows == "some":
        kinds, numbers = kinds_of(family, theirs, path)
        layers = {"kinds": kinds, "layer_kinds": numbers}
    return EncoderConfig(
        **fields,
        **layers,
        **family.constants,
        **family.fields(theirs),
        max_positions=theirs.max_position_embeddings - offset,
        position_offset=offset,
        pad_id=pad_id,
    )


def _with_labels(
    config: Config, theirs: "PreTrainedConfig", num_labels: int | None
) -> Config:
    """Returns a configuration with the labels of transformers', or so many others."""
    labels = cast("dict[int, str]", theirs.id2label)
    names = tuple(labels[i] for i in sorted(labels))
    is_unnamed = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    size = len(names) if num_labels is None else num_labels
    is_named = len(names) == size and not is_unnamed
    return replace(config, num_labels=size, label_names=names if is_named else None)


def _renamed(family: Family | DecoderFamily) -> Mapping[str, str]:
    """Returns the family's own names of settings that are BERT's otherwise."""
    return family.renamed if isinstance(family, Family) else {}


def _fields(family: Family) -> dict[str, str]:
    """Returns the settings of a family by our fields."""
    return {
        ours: family.renamed.get(name, name)
        for ours, name in _FIELDS.items()
        if ours not in family.constants
    }


def _their_labels(config: Config) -> dict[str, object]:
    """Returns the fields that name the labels."""
    if config.label_names is None:
        return {"num_labels": config.num_labels}
    return {
        "id2label": dict(enumerate(config.label_names)),
        "label2id": {name: i for i, name in enumerate(config.label_names)},
    }
