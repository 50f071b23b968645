"""Rows of a file: tab-separated, CSV, JSON or JSON lines."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sparse_jax.errors import InputError
from sparse_jax.tasks.glue import Task

__all__ = ["SUFFIXES", "Rows", "Source", "read_objects", "read_rows", "read_text"]


class Source(NamedTuple):
    """Where rows come from, in the words of a message.

    Example:
      >>> Source("`a.csv`", "line").at(3)
      '`a.csv` line 3'
    """

    name: str
    unit: str

    def at(self, number: int) -> str:
        """Returns the place of a row."""
        return f"{self.name} {self.unit} {number}"


Numbered = Iterator[tuple[int, Mapping[str, Any]]]


Reader = Callable[..., Numbered]


class Rows(NamedTuple):
    """Numbered rows, each a mapping from columns to values, and their source."""

    source: Source
    numbered: Numbered


def read_rows(path: str | Path, task: Task) -> Rows:
    """Returns the rows of a file, with the numbers of their lines.

    The extension says the format: `.tsv` and `.txt` are tab-separated and have no
    quoting (GLUE has unbalanced quotes), `.csv` has quoting, `.jsonl` has one object
    in each line, and `.json` is a list of objects.

    Args:
      path: file in UTF-8, with or without a byte-order mark.
      task: knows the columns of official files without a header.

    Raises:
      InputError: if the file is absent, has another extension or is not UTF-8; while
        iterating, if a row breaks the format.
    """
    path = Path(path)
    reader, source = _reader(path, _READERS), _source(path)
    return Rows(source, reader(read_text(path), source, task))


def read_objects(path: str | Path) -> Rows:
    """Returns the objects of a `.json` or `.jsonl` file, with their numbers.

    Raises:
      InputError: as `read_rows`.
    """
    path = Path(path)
    reader, source = _reader(path, _OBJECT_READERS), _source(path)
    return Rows(source, reader(read_text(path), source))


def _reader(path: Path, readers: Mapping[str, Reader]) -> Reader:
    """Returns the reader for a file's extension."""
    if path.suffix.lower() not in readers:
        raise InputError(
            f"`{path}` must end in {', '.join(readers)}, got {path.suffix!r}. "
            "Convert the file to one of these."
        )
    return readers[path.suffix.lower()]


def _source(path: Path) -> Source:
    """Returns a file as the source of its rows."""
    return Source(f"`{path}`", "item" if path.suffix.lower() == ".json" else "line")


def read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8, without a byte-order mark.

    Raises:
      InputError: if there is no file or it is not UTF-8, with the line.
    """
    if not path.is_file():
        raise InputError(f"`{path}` must be a file, and there is none.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"`{path}` line {line} must be UTF-8, got the byte "
            f"0x{error.object[error.start]:02x}. Convert the file to UTF-8."
        ) from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, with their numbers."""
    # Not `splitlines`, which also breaks at characters that occur in sentences.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line


def _tab_separated(text: str, source: Source, task: Task) -> Numbered:
    """Yields the rows of a tab-separated text."""
    lines = ((number, line.split("\t")) for number, line in _lines(text))
    first = next(lines, (1, []))
    columns = first[1]
    if columns and task.headerless and not {*columns} & {*task.text_a, *task.label}:
        columns = list(task.headerless)
        yield first[0], _fields(source.at(first[0]), columns, first[1])
    for number, values in lines:
        if task.drops_short_rows and len(values) < len(columns):
            continue
        yield number, _fields(source.at(number), columns, values)


def _comma_separated(text: str, source: Source, task: Task) -> Numbered:
    """Yields the rows of a CSV text; a row's line is its last one."""
    del task
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(reader, [])
        for values in filter(None, reader):
            place = source.at(reader.line_num)
            yield reader.line_num, _fields(place, columns, values)
    except csv.Error as error:
        raise InputError(
            f"{source.at(reader.line_num)} must be CSV: {error}. "
            "Write a quote inside a field twice."
        ) from error


def _json_lines(text: str, source: Source, task: Task | None = None) -> Numbered:
    """Yields the objects of a text with one in each line."""
    del task
    for number, line in _lines(text):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{source.at(number)} must be a JSON object: {error.msg} at "
                f"character {error.colno}."
            ) from error
        yield number, _object(source.at(number), value)


def _json_list(text: str, source: Source, task: Task | None = None) -> Numbered:
    """Yields the objects of a JSON list."""
    del task
    try:
        values = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source.name} line {error.lineno} must be JSON: {error.msg} at "
            f"character {error.colno}. Objects in lines belong in a `.jsonl` file."
        ) from error
    if not isinstance(values, list):
        raise InputError(
            f"{source.name} must be a list of objects, got {type(values).__name__}."
        )
    for number, value in enumerate(values, start=1):
        yield number, _object(source.at(number), value)


def _fields(place: str, columns: list[str], values: list[str]) -> Mapping[str, Any]:
    """Returns the fields of a row by column."""
    if len(values) != len(columns):
        raise InputError(
            f"{place} must have {len(columns)} fields ({', '.join(columns)}), "
            f"got {len(values)}."
        )
    return dict(zip(columns, values, strict=True))


def _object(place: str, value: Any) -> Mapping[str, Any]:
    """Returns a JSON object."""
    if not isinstance(value, dict):
        raise InputError(f"{place} must be an object, got {type(value).__name__}.")
    return value


_OBJECT_READERS = MappingProxyType({".json": _json_list, ".jsonl": _json_lines})
_READERS = MappingProxyType(
    {
        ".tsv": _tab_separated,
        ".txt": _tab_separated,
        ".csv": _comma_separated,
        **_OBJECT_READERS,
    }
)
SUFFIXES = tuple(_READERS)
