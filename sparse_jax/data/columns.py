"""The columns of a task, picked from rows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparse_jax.data.glue import Task
from sparse_jax.data.read_rows import Rows, Source
from sparse_jax.errors import InputError, brief, listed

__all__ = ["Columns", "read_columns", "text_of"]


class Columns(NamedTuple):
    """Texts and labels as they stand in the data."""

    source: Source
    numbers: list[int]  # of the rows, for messages
    text_a: list[str]
    text_b: list[str] | None  # None if the examples are single texts
    labels: list[Any]  # None where there is no label


def read_columns(rows: Rows, task: Task, *, needs_labels: bool = True) -> Columns:
    """Returns the columns that a task needs.

    Raises:
      InputError: if there is no row, a column is absent, or is there under two names
        with different values, or a text is no string.
    """
    numbers, text_a, labels = [], [], []
    text_b: list[str | None] = []
    for number, fields in rows.numbered:
        place = rows.source.at(number)
        numbers.append(number)
        text_a.append(text_of(place, fields, task.text_a))
        has_text_b = _has_text_b(fields, task)
        text_b.append(text_of(place, fields, task.text_b) if has_text_b else None)
        if needs_labels:
            _require(place, fields, task.label)
        labels.append(_value(place, fields, task.label))
    _require_uniform(rows.source, numbers, text_b)
    pairs = [text for text in text_b if text is not None]
    return Columns(rows.source, numbers, text_a, pairs or None, labels)


def _has_text_b(fields: Mapping[str, Any], task: Task) -> bool:
    """Says whether a row must have a second text."""
    if task.has_optional_text_b:
        return any(fields.get(name) is not None for name in task.text_b)
    return bool(task.text_b)


def text_of(place: str, fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Returns one text of a row.

    Raises:
      InputError: if the row has none of the columns, two with different values, or no
        text of whole characters.
    """
    _require(place, fields, names)
    text = _value(place, fields, names)
    if not isinstance(text, str):
        raise InputError(
            f"{place} must have a text in {_either(names)}, got {brief(text)}."
        )
    # JSON can write half of a character, which no tokenizer takes.
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(
            f"{place} must have whole characters in {_either(names)}, got a lone "
            "surrogate. Write the character in full."
        )
    return text


def _value(place: str, fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Returns the value under the first of some names that has one, or None."""
    found = [name for name in names if fields.get(name) is not None]
    for name in found[1:]:
        if str(fields[name]) != str(fields[found[0]]):
            raise InputError(
                f"{place} must have one of {_either((found[0], name))}, got both with "
                "different values. Remove or rename the one that is not meant."
            )
    return fields[found[0]] if found else None


def _require(place: str, fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises unless a row has one of some columns."""
    if not any(name in fields for name in names):
        raise InputError(
            f"{place} must have a column {_either(names)}, got the columns "
            f"{listed(fields)}."
        )


def _either(names: tuple[str, ...]) -> str:
    """Returns names as a choice."""
    return " or ".join(f"`{name}`" for name in names)


def _require_uniform(
    source: Source, numbers: list[int], text_b: list[str | None]
) -> None:
    """Raises unless there are rows, and all or none of them have second texts."""
    if not numbers:
        raise InputError(f"{source.name} must have examples, got an empty file.")
    for number, text in zip(numbers, text_b, strict=True):
        if (text is None) != (text_b[0] is None):
            raise InputError(
                f"{source.at(number)} must have a second text exactly if the rows "
                "before it do. Write the same columns in every row."
            )
