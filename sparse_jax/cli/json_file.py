"""The file that `--json` names."""

import json
from pathlib import Path

from sparse_jax.errors import InputError, reason_of

__all__ = ["require_json_place", "write_json"]


def require_json_place(path: str | None) -> None:
    """Raises if a file, which may take minutes to compute, could not be written."""
    if path is None:
        return
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise InputError(
            f"`json` must be a file in a folder that exists, got {path!r}."
        )


def write_json(path: str, value: object) -> None:
    """Writes a value.

    Raises:
      InputError: if that is not possible.
    """
    try:
        Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"`json` must be a file that can be written, got {path!r}: "
            f"{reason_of(error)}."
        ) from error
