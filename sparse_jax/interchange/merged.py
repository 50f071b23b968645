"""A model with its adapter in it, as transformers loads it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from sparse_jax.data.chat_template import warn_of_template
from sparse_jax.data.glue import TASKS
from sparse_jax.data.tokenizer import load_tokenizer, warn_of_tokenizer
from sparse_jax.interchange.source import DTYPES, Source
from sparse_jax.models.hf.model_files import TOKENIZER_FILES, read_object
from sparse_jax.models.hf.pretrained import save_pretrained
from sparse_jax.params.fields import Json, require_word

__all__ = ["write_merged"]

SHARD_SIZE = "5GB"

CONFIG, GENERATION = "config.json", "generation_config.json"
# Of the configuration of a base, what its fine-tuned model does not keep: the labels,
# code that is never run here, and other names of what is written anew.
_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "_num_labels")
_OLD = ("auto_map", "torch_dtype", "_name_or_path")


def write_merged(
    source: Source,
    folder: Path,
    *,
    dtype: str | None = None,
    shard_size: str | int = SHARD_SIZE,
) -> None:
    """Writes the weights, configurations and tokenizer of the adapted model.

    Args:
      source: adapter and base.
      folder: that exists.
      dtype: of the weights; None is that of the training, so that logits are equal.
      shard_size: most bytes of a file.

    Raises:
      InputError: if the base has no tokenizer or is another one, or the method cannot
        be merged.
    """
    if dtype is not None:
        require_word("dtype", dtype, DTYPES)
    settings = source.adapter.settings
    tokenizer = load_tokenizer(source.folder)
    warn_of_tokenizer(settings.get("tokenizer_hash"), tokenizer)
    if settings.get("chat_template_hash"):
        warn_of_template(settings["chat_template_hash"], tokenizer)
    model = source.model
    save_pretrained(model, source.merged(), folder, dtype=dtype, shard_size=shard_size)
    # Of tokens that may pad a text, the first are those that it does not hold itself.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    _complete_config(source, folder, pads)
    if source.is_causal:
        _write_generation_config(source, folder)
    for pattern in TOKENIZER_FILES:
        for path in sorted(source.folder.glob(pattern)):
            place = folder / path.relative_to(source.folder)
            place.parent.mkdir(exist_ok=True)
            # Not `copy`: files of the Hub's cache may be closed to others.
            shutil.copyfile(path, place)


def _complete_config(source: Source, folder: Path, pads: Sequence[Json]) -> None:
    """Adds what the configuration of the base says and ours does not."""
    base, written = read_object(source.folder / CONFIG), read_object(folder / CONFIG)
    fields = {name: base[name] for name in base if name not in _OLD}
    config = source.model.config
    words = range(config.vocab_size)
    if source.is_causal:
        fields["tie_word_embeddings"] = config.tied
    else:
        fields = {name: fields[name] for name in fields if name not in _LABELS}
        fields |= {name: written[name] for name in _LABELS if name in written}
        if (task := TASKS.get(source.adapter.task)) is not None:
            fields["problem_type"] = task.problem_type
        # With none, transformers scores one text at a time with a decoder.
        if source.model.family.is_decoder and config.pad_id not in words:
            fields["pad_token_id"] = next(one for one in pads if one in words)
    for name in ("architectures", "dtype", "transformers_version"):
        fields[name] = written[name]
    _write(folder / CONFIG, fields)


def _write_generation_config(source: Source, folder: Path) -> None:
    """Writes how texts are generated: as by the base, to the end that was trained."""
    if (source.folder / GENERATION).is_file():
        fields = read_object(source.folder / GENERATION)
    else:
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(folder)
        made = GenerationConfig.from_model_config(config)
        fields = made.to_diff_dict()
        # With it `generate` would read the configuration of the model once more.
        fields.pop("_from_model_config", None)
    trained = source.adapter.settings.get("eos_token_id") or ()
    size = source.model.config.vocab_size
    ends = [end for end in trained if type(end) is int and 0 <= end < size]
    known = fields.get("eos_token_id")
    known = [] if known is None else known if isinstance(known, list) else [known]
    if more := [end for end in ends if end not in known]:
        fields["eos_token_id"] = [*known, *more]
    _write(folder / GENERATION, fields)


def _write(path: Path, fields: dict[str, Json]) -> None:
    """Writes an object as transformers does."""
    text = json.dumps(fields, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
