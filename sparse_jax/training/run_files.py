"""The files of a run directory: JSON, validated when read, written atomically."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_jax.adapter.file import replacing
from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.training.history import is_evaluation, updates_of

__all__ = [
    "read_json",
    "read_metrics",
    "read_rows",
    "row_line",
    "write_json",
    "write_text",
]

_REMEDY = "Put it back, or pass --overwrite to start over."
# Of `metrics.json`.
_COUNTS = (
    "adapter_bytes", "optimizer_bytes", "peak_memory_bytes", "seconds_per_step",
    "skipped_batches", "steps", "total_parameters", "trained_parameters",
    "trained_parameters_without_head",
)  # fmt: skip
_LARGEST = 2.0**1000
_OF_UPDATES = (
    "seconds",
    "tokens",
    "is_compiling",
)  # beside the loss, which may be null


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file.

    Raises:
      InputError: if it cannot be read, or is something else.
    """
    return _parse(f"`{path}`", _read(path))


def read_metrics(path: Path) -> dict[str, Any]:
    """Returns what a `metrics.json` holds.

    Raises:
      InputError: if it cannot be read, or is not that of a finished run.
    """
    metrics = read_json(path)
    for name in _COUNTS:
        least = 1 if name == "total_parameters" else 0
        if not (_is_number(metrics.get(name)) and metrics[name] >= least):
            raise InputError(
                f"`{path}` must have a number as `{name}`, got "
                f"{brief(metrics.get(name))}. {_REMEDY}"
            )
    found = metrics.get("eval")
    if not isinstance(found, dict) or not all(map(_is_result, found.values())):
        raise InputError(
            f"`{path}` must have metrics as `eval`, got {brief(found)}. {_REMEDY}"
        )
    return metrics


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a `metrics.jsonl`; none if it does not exist.

    Raises:
      InputError: with the line that is not the row of a run.
    """
    # What follows the last line break was cut off when the run was killed.
    lines = _read(path).split(b"\n")[:-1] if path.exists() else []
    return [_row(f"`{path}` line {i}", line) for i, line in enumerate(lines, 1)]


def row_line(row: Mapping[str, Any]) -> bytes:
    """Returns a row as a line of JSON."""
    return (json.dumps(_plain(row), allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes readable JSON atomically."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    write_text(path, text.encode())


def write_text(path: Path, text: bytes) -> None:
    """Writes a text in UTF-8 atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(text)


def _read(path: Path) -> bytes:
    """Returns the content of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"`{path}` must be a file that can be read: {reason_of(error)}. {_REMEDY}"
        ) from error


def _parse(place: str, text: bytes) -> dict[str, Any]:
    """Returns a JSON object, or raises with its place."""
    try:
        value = json.loads(text.decode(), parse_constant=_refuse)
        reason = f"got {type(value).__name__}"
    # The second is that of JSON nested too deep.
    except (ValueError, RecursionError) as error:
        value, reason = None, f"which it is not: {reason_of(error)}"
    if not isinstance(value, dict):
        raise InputError(f"{place} must be a JSON object, {reason}. {_REMEDY}")
    return value


def _refuse(word: str) -> Any:
    """Raises for NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{word} is not JSON")


def _row(place: str, line: bytes) -> dict[str, Any]:
    """Returns the row of an update, of an evaluation, or of another event."""
    row = _parse(place, line)
    step = row.get("step")
    if type(step) is not int or step < 0:
        raise InputError(
            f"{place} must have a `step`, a whole number, got {brief(step)}. {_REMEDY}"
        )
    if is_evaluation(row):
        if not isinstance(row["split"], str):
            raise InputError(
                f"{place} must have a name as `split`, got {brief(row['split'])}. "
                f"{_REMEDY}"
            )
        wrong = [name for name in row if name != "split" and not _is_result(row[name])]
    elif updates_of([row]):
        wrong = [name for name in _OF_UPDATES if not _is_number(row.get(name))]
        wrong += [] if _is_result(row["loss"]) else ["loss"]
    else:
        wrong = []
    if wrong:
        raise InputError(
            f"{place} must have a number as `{wrong[0]}`, got "
            f"{brief(row.get(wrong[0]))}. {_REMEDY}"
        )
    return row


def _is_number(value: Any) -> bool:
    """Returns whether a value is a number of common size."""
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _is_result(value: Any) -> bool:
    """Returns whether a value is a number, or the null that stands for another one."""
    return value is None or _is_number(value)


def _plain(value: Any) -> Any:
    """Returns a value with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
