"""The columns of a task, picked from rows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparse_jax.errors import InputError
from sparse_jax.tasks.glue import Task
from sparse_jax.tasks.rows import Rows, Source

__all__ = ["Columns", "read_columns", "text_of"]


class Columns(NamedTuple):
    """Texts and labels as they stand in the data."""

    source: Source
    numbers: list[int]  # of the rows, for messages
    text_a: list[str]
    text_b: list[str] | None  # None if the examples are single texts
    labels: list[Any]  # None where there is no label

    @property
    def are_labelled(self) -> bool:
        """Whether any row has a label; test files often have none or -1."""
        return any(label not in (None, "", -1, "-1") for label in self.labels)


def read_columns(rows: Rows, task: Task, *, needs_labels: bool = True) -> Columns:
    """Returns the columns that a task needs.

    Raises:
      InputError: if there is no row, a column is absent, or a text is no string.
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
        labels.append(_first(fields, task.label))
    _require_uniform(rows.source, numbers, text_b)
    pairs = [text for text in text_b if text is not None]
    return Columns(rows.source, numbers, text_a, pairs or None, labels)


def _has_text_b(fields: Mapping[str, Any], task: Task) -> bool:
    """Says whether a row must have a second text."""
    if task.has_optional_text_b:
        return _first(fields, task.text_b) is not None
    return bool(task.text_b)


def text_of(place: str, fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Returns one text of a row.

    Raises:
      InputError: if the row has none of the columns, or no text of whole characters.
    """
    _require(place, fields, names)
    text = _first(fields, names)
    if not isinstance(text, str):
        raise InputError(f"{place} must have a text in {_either(names)}, got {text!r}.")
    # JSON can write half of a character, which no tokenizer takes.
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(
            f"{place} must have whole characters in {_either(names)}, got a lone "
            "surrogate. Write the character in full."
        )
    return text


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Returns the value of the first column that a row has, None if it has none."""
    return next((fields[name] for name in names if name in fields), None)


def _require(place: str, fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises unless a row has one of some columns."""
    if not any(name in fields for name in names):
        raise InputError(
            f"{place} must have a column {_either(names)}, got the columns "
            f"{', '.join(fields)}."
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
