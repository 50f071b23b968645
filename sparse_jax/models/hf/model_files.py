"""Where the files of a model are."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sparse_jax.errors import InputError, brief, first_line, reason_of
from sparse_jax.models.hf.tensors import INDEX, WEIGHTS, shards_of
from sparse_jax.params.fields import Json

__all__ = [
    "PEFT_CONFIG",
    "TOKENIZER_FILES",
    "cached_folder",
    "config_folder",
    "hub_id",
    "local_folder",
    "read_object",
    "require_no_peft",
]

PEFT_CONFIG = "adapter_config.json"  # in a folder that Hugging Face PEFT writes

# An id is a name, or an owner and a name.
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# By name, because a pattern such as `*.json` also matches files of folders like `onnx`
# and `original`, which hold the weights once more. No pickles: loading one runs code.
_CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_FILES = (_CONFIG, WEIGHTS, INDEX, "generation_config.json", *TOKENIZER_FILES)


def local_folder(model: str | Path) -> Path:
    """Returns the folder of a model, after fetching it if `model` is no folder.

    Args:
      model: local folder, or the id of a model on the Hugging Face Hub.

    Raises:
      InputError: if `model` is neither a folder nor an id that can be fetched.
    """
    folder = _folder(model, _FILES)
    index = folder / INDEX
    if folder == Path(model) or (folder / WEIGHTS).is_file() or not index.is_file():
        return folder
    # The shards of the same revision, also if the model is changed meanwhile.
    return _folder(model, shards_of(index), revision=folder.name)


def config_folder(model: str | Path) -> Path:
    """Returns a folder with the `config.json` of a model, fetching no weights.

    The argument and the error are those of `local_folder`.
    """
    return _folder(model, [_CONFIG])


def cached_folder(model: str) -> Path:
    """Returns the folder of an adapter's base if it is here, and fetches nothing.

    Args:
      model: local folder, or id of a model on the Hugging Face Hub.

    Raises:
      InputError: if there is no such folder, and no model of that id was fetched.
    """
    # A name from a file may be too long for `Path.is_dir`.
    if os.path.isdir(model):
        return Path(model)
    try:
        if _ID.fullmatch(model):
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):
        pass
    raise InputError(
        "`model` must be given if the base of an adapter is neither a folder nor in "
        f"the cache of the Hub, got none, and the adapter names {brief(model)}. Pass "
        "it, or the folder where it is, as `model`."
    )


def hub_id(model: str | Path | None) -> str | None:
    """Returns the id of a model on the Hugging Face Hub, None for a local folder.

    Example:
      >>> hub_id("FacebookAI/roberta-large"), hub_id("/models/bert"), hub_id(None)
      ('FacebookAI/roberta-large', None, None)
    """
    name = str(model or "")
    return name if _ID.fullmatch(name) and not os.path.isdir(name) else None


def require_no_peft(argument: str, folder: Path) -> None:
    """Raises if a folder holds an adapter of Hugging Face PEFT.

    Raises:
      InputError: saying what to do with it.
    """
    if (folder / PEFT_CONFIG).is_file():
        raise InputError(
            f"`{argument}` must be of sparse_jax or a whole model, got the PEFT "
            f"adapter in `{folder}`, which has an `{PEFT_CONFIG}`. Read it with "
            "`open_adapter`, or pass it as the adapter of a base where adapters of "
            "PEFT are taken: to evaluate, generate or export."
        )


def _folder(
    model: str | Path, files: Sequence[str], revision: str | None = None
) -> Path:
    """Returns the folder of a model that has some of its files."""
    # A name that is too long for a folder makes `Path.is_dir` raise.
    if os.path.isdir(model):
        return Path(model)
    if not _ID.fullmatch(str(model)):
        raise InputError(
            "`model` must be a local folder or the id of a model on the Hugging Face "
            f"Hub, got {brief(str(model))}, which is neither. Check the spelling."
        )
    # huggingface_hub is slow to import, so it is imported where it is used.
    from huggingface_hub import snapshot_download

    try:
        options = {"allow_patterns": list(files), "revision": revision}
        return Path(snapshot_download(str(model), **options))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"`model` must be a local folder or the id of a model on the Hugging Face "
            f"Hub, got {brief(str(model))}, which is no folder and cannot be fetched: "
            f"{reason}. Check the spelling and the connection."
        ) from error


def read_object(path: Path) -> dict[str, Json]:
    """Returns the JSON object in a file.

    Raises:
      InputError: if there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        reason = f"got {type(found).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        found, reason = None, reason_of(error)
    if not isinstance(found, dict):
        raise InputError(f"`{path}` must be a JSON object: {reason}. Copy it again.")
    return found
