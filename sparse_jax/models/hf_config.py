"""Hugging Face `config.json`, in and out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import jax.typing

from sparse_jax.errors import InputError
from sparse_jax.models.bert import BERT
from sparse_jax.models.bloom import BLOOM
from sparse_jax.models.classic_config import ClassicConfig
from sparse_jax.models.classic_family import ClassicFamily
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.decoder_config import DecoderConfig
from sparse_jax.models.decoder_family import DecoderFamily
from sparse_jax.models.family import Family
from sparse_jax.models.gemma import GEMMA
from sparse_jax.models.gpt2 import GPT2
from sparse_jax.models.gptj import GPTJ
from sparse_jax.models.hf_classic_config import classic_config, their_classic_fields
from sparse_jax.models.hf_decoder_config import decoder_config, their_decoder_fields
from sparse_jax.models.llama import LLAMA
from sparse_jax.models.mistral import MISTRAL
from sparse_jax.models.pure import PureModel
from sparse_jax.models.qwen import QWEN2, QWEN3
from sparse_jax.models.roberta import ROBERTA

__all__ = ["FAMILIES", "read_config", "write_config"]

FAMILIES = MappingProxyType(
    {
        family.name: family
        for family in (
            BERT,
            ROBERTA,
            LLAMA,
            MISTRAL,
            QWEN2,
            QWEN3,
            GEMMA,
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
        "initializer_range": "initializer_range",
    }
)
# Sizes that all files have, under these or the family's own names.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# Of BLOOM, which no map of names has.
_OLD_NAMES = {"hidden_size": ("n_embed",)}


def read_config(
    folder: str | Path, *, num_labels: int | None = None
) -> tuple[Family | DecoderFamily, EncoderConfig | DecoderConfig | ClassicConfig]:
    """Reads the family and the sizes of the model in a folder.

    Args:
      folder: folder with a `config.json`, of any transformers version.
      num_labels: labels of the head; None takes those of the file.

    Raises:
      InputError: if the file is absent, is not JSON, lacks a size, names a model type
        that is not supported, or describes something other than an encoder with
        absolute positions.
    """
    # transformers takes seconds to import, so it is imported where it is used.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(folder) / "config.json"
    family = _family_in(path)
    more = () if isinstance(family, ClassicFamily) else ("intermediate_size",)
    _require_sizes(path, (*_SIZES, *more), CONFIG_MAPPING[family.name].attribute_map)
    try:
        theirs = AutoConfig.from_pretrained(path.parent)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"`{path}` must be a valid {family.name} configuration: {reason}."
        ) from error
    if isinstance(family, ClassicFamily):
        return family, classic_config(family, theirs, path)
    if isinstance(family, DecoderFamily):
        return family, decoder_config(family, theirs, path)
    _require_encoder(path, theirs)
    return family, _from_theirs(family, theirs, num_labels)


def write_config(
    model: PureModel, folder: Path, dtype: jax.typing.DTypeLike = jnp.float32
) -> None:
    """Writes a `config.json` that transformers reads."""
    from transformers import AutoConfig

    config, family = model.config, model.family
    shared = {
        "architectures": [family.architectures[model.head.__name__]],
        "dtype": jnp.dtype(dtype).name,
    }
    if isinstance(family, DecoderFamily):
        if isinstance(family, ClassicFamily):
            fields = their_classic_fields(family, config)
        else:
            fields = their_decoder_fields(family, config)
        AutoConfig.for_model(family.name, **fields, **shared).save_pretrained(folder)
        return
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    theirs = AutoConfig.for_model(
        family.name,
        **fields,
        max_position_embeddings=config.max_positions + config.position_offset,
        pad_token_id=config.pad_id,
        classifier_dropout=config.classifier_dropout,
        **shared,
        **_their_labels(config),
    )
    theirs.save_pretrained(folder)


def _family_in(path: Path) -> Family | DecoderFamily:
    """Returns the family that a configuration file names."""
    if not path.is_file():
        raise InputError(
            f"`model` must be a folder with a `config.json`, got `{path.parent}`. "
            "Save a model there with `save_pretrained`."
        )
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"`{path}` must be a JSON object: {error}.") from error
    if model_type not in FAMILIES:
        raise InputError(
            f"`model_type` in `{path}` must be one of {', '.join(sorted(FAMILIES))}, "
            f"got {model_type!r}."
        )
    return FAMILIES[model_type]


def _require_sizes(
    path: Path, sizes: Sequence[str], own_names: Mapping[str, str]
) -> None:
    """Raises unless a file has the sizes, for which transformers has defaults."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in sizes:
        words = (own_names.get(name, name), name, *_OLD_NAMES.get(name, ()))
        found = next((word for word in words if word in fields), None)
        if found is None:
            raise InputError(
                f"`{words[0]}` must be in `{path}`, and is not. Copy the file that "
                "belongs to the model again."
            )
        if isinstance(fields[found], int) and fields[found] < 1:
            raise InputError(
                f"`{found}` in `{path}` must be positive, got {fields[found]}."
            )


def _require_encoder(path: Path, theirs: Any) -> None:
    """Raises unless the model is an encoder with absolute positions."""
    positions = getattr(theirs, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise InputError(
            f"`position_embedding_type` in `{path}` must be 'absolute', "
            f"got {positions!r}."
        )
    if theirs.is_decoder or theirs.add_cross_attention:
        raise InputError(
            f"`is_decoder` and `add_cross_attention` in `{path}` must be false: "
            "these models read a sequence in both directions."
        )


def _from_theirs(family: Family, theirs: Any, num_labels: int | None) -> EncoderConfig:
    """Translates a transformers configuration."""
    pad_id = theirs.pad_token_id or 0
    offset = family.position_offset(pad_id)
    rate = theirs.classifier_dropout
    names = tuple(theirs.id2label[i] for i in sorted(theirs.id2label))
    is_unnamed = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    num_labels = len(names) if num_labels is None else num_labels
    return EncoderConfig(
        **{ours: getattr(theirs, name) for ours, name in _FIELDS.items()},
        max_positions=theirs.max_position_embeddings - offset,
        position_offset=offset,
        pad_id=pad_id,
        classifier_dropout=theirs.hidden_dropout_prob if rate is None else rate,
        num_labels=num_labels,
        label_names=names if len(names) == num_labels and not is_unnamed else None,
    )


def _their_labels(config: EncoderConfig) -> dict[str, Any]:
    """Returns the fields that name the labels."""
    if config.label_names is None:
        return {"num_labels": config.num_labels}
    return {
        "id2label": dict(enumerate(config.label_names)),
        "label2id": {name: i for i, name in enumerate(config.label_names)},
    }
