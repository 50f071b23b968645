"""Where the files of a model are."""

import os
import re
from pathlib import Path

from sparse_jax.errors import InputError, brief

__all__ = [
    "PEFT_CONFIG",
    "cached_folder",
    "config_folder",
    "local_folder",
    "require_no_peft",
]

PEFT_CONFIG = "adapter_config.json"  # in a folder that Hugging Face PEFT writes

# An id is a name, or an owner and a name.
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# No pickles: loading one runs the code in it.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def local_folder(model: str | Path) -> Path:
    """Returns the folder of a model, after fetching it if `model` is no folder.

    Args:
      model: local folder, or the id of a model on the Hugging Face Hub.

    Raises:
      InputError: if `model` is neither a folder nor an id that can be fetched.
    """
    return _folder(model, _FILES)


def config_folder(model: str | Path) -> Path:
    """Returns a folder with the `config.json` of a model, fetching no weights.

    The argument and the error are those of `local_folder`.
    """
    return _folder(model, ["config.json"])


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

            return Path(
                snapshot_download(model, allow_patterns=_FILES, local_files_only=True)
            )
    except (OSError, ValueError):
        pass
    raise InputError(
        "`model` must be given if the base of an adapter is neither a folder nor in "
        f"the cache of the Hub, got none, and the adapter names {brief(model)}. Pass "
        "it, or the folder where it is, as --model."
    )


def require_no_peft(argument: str, folder: Path) -> None:
    """Raises if a folder holds an adapter of Hugging Face PEFT.

    Raises:
      InputError: saying what to do with it.
    """
    if (folder / PEFT_CONFIG).is_file():
        raise InputError(
            f"`{argument}` must be of sparse_jax or a whole model, got the PEFT "
            f"adapter in `{folder}`, which has an `{PEFT_CONFIG}`. Merge it into its "
            "base with PEFT's `merge_and_unload`, save that with its tokenizer, and "
            "pass the folder as `model`."
        )


def _folder(model: str | Path, files: list[str]) -> Path:
    """Returns the folder of a model that has some of its files."""
    if Path(model).is_dir():
        return Path(model)
    if not _ID.fullmatch(str(model)):
        raise InputError(
            "`model` must be a local folder or the id of a model on the Hugging Face "
            f"Hub, got {str(model)!r}, which is neither. Check the spelling."
        )
    # huggingface_hub is slow to import, so it is imported where it is used.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"`model` must be a local folder or the id of a model on the Hugging Face "
            f"Hub, got {str(model)!r}, which is no folder and cannot be fetched: "
            f"{reason}. Check the spelling and the connection."
        ) from error
