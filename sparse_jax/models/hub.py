"""Where the files of a model are."""

import re
from pathlib import Path

from sparse_jax.errors import InputError

__all__ = ["config_folder", "local_folder"]

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
