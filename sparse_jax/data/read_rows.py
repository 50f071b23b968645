"""Rows of a file: tab-separated, CSV, JSON, JSON lines or Parquet."""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from sparse_jax.data.glue import TASKS, Task
from sparse_jax.errors import InputError, brief, listed, reason_of

__all__ = [
    "JSON_LINES",
    "PARQUET",
    "SUFFIXES",
    "WEIGHT",
    "Record",
    "Rows",
    "Source",
    "as_record",
    "read_line",
    "read_objects",
    "read_rows",
    "read_table",
    "read_text",
    "require_file",
]

# Of characters; the reader of the standard library refuses fields above 131,072.
_LONGEST_FIELD = 2**31 - 1
_ROWS = 4096  # of a Parquet file that are read at once
JSON_LINES, PARQUET = ".jsonl", ".parquet"
_BETWEEN = " \t\r\n,"  # the items of a list


class Source(NamedTuple):
    """Where rows come from, in the words of a message.

    Example:
      >>> Source("`a.csv`", "line").at(3)
      '`a.csv` line 3'
    """

    name: str
    unit: str
    has_types: bool = True  # whether numbers and words differ, as in JSON
    places: "tuple[tuple[Source, int], ...]" = ()  # of a mixture: of every row

    def at(self, number: int) -> str:
        """Returns the place of a row."""
        if self.places:
            source, number = self.places[number]
            return source.at(number)
        return f"{self.name} {self.unit} {number}"


# A column that counts only where `columns` names it: some data have one of their own.
WEIGHT = "weight"
Record = Mapping[str, object]
Numbered = Iterator[tuple[int, Record]]


class Rows(NamedTuple):
    """Numbered rows, each a mapping from columns to values, and their source."""

    source: Source
    numbered: Iterable[tuple[int, Record]]
    is_weighted: bool = False  # whether their column `weight` counts in the loss


def read_rows(path: str | Path, task: Task = TASKS["classification"]) -> Rows:
    """Returns the rows of a file, with the numbers of their lines.

    The extension says the format: `.tsv` and `.txt` are tab-separated and have no
    quoting (GLUE has unbalanced quotes), `.csv` has quoting, `.jsonl` has one object
    in each line, `.json` is a list of objects, and `.parquet` a table. No column, and
    no key of an object, is there twice.

    Args:
      path: file in UTF-8, with or without a byte-order mark.
      task: knows the columns of official files without a header.

    Raises:
      InputError: if the file is absent, has another extension or is not UTF-8; while
        iterating, if a row breaks the format.
    """
    tab_separated = partial(_tab_separated, task=task)
    tables = {
        ".tsv": tab_separated,
        ".txt": tab_separated,
        ".csv": _comma_separated,
    }
    return _rows(Path(path), {**tables, **_OBJECTS, PARQUET: _parquet})


def read_objects(path: str | Path) -> Rows:
    """Returns the objects of a `.json` or `.jsonl` file, with their numbers.

    Raises:
      InputError: as `read_rows`.
    """
    return _rows(Path(path), _OBJECTS)


def read_table(path: Path, columns: Sequence[str]) -> Rows:
    """Returns the rows of a CSV file without a header, with their numbers.

    Raises:
      InputError: as `read_rows`.
    """
    source = Source(f"`{path}`", "line", has_types=False)
    rows = iter(_csv_rows(read_text(path), source))
    return Rows(source, _table(source, 1, [*columns], rows))


def _parquet(path: str | Path, source: Source) -> Numbered:
    """Yields the rows of a Parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    # A torn file raises either.
    except (ArrowException, OSError) as error:
        raise InputError(
            f"{source.name} must be a Parquet file: {reason_of(error)}. Write it again."
        ) from error


def _rows(path: Path, readers: Mapping[str, Callable[[str, Source], Numbered]]) -> Rows:
    """Returns the rows of a file, read as its extension says."""
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(
            f"`{path}` must end in {', '.join(readers)}, got {path.suffix!r}. "
            "Convert the file to one of these."
        )
    unit = {".json": "item", PARQUET: "row"}.get(suffix, "line")
    has_types = suffix in (*_OBJECTS, PARQUET)
    source = Source(f"`{path}`", unit, has_types=has_types)
    if suffix == PARQUET:
        return Rows(source, _parquet(path, source))
    return Rows(source, readers[suffix](read_text(path), source))


def read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8, without a byte-order mark.

    Raises:
      InputError: if there is no file or it cannot be read, or if it is not UTF-8 or
        has a byte 0, with the line.
    """
    try:
        if not path.is_file():
            raise InputError(f"`{path}` must be a file, and there is none.")
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(
            f"`{path}` must be a file that can be read: {reason_of(error)}."
        ) from error
    return _decoded(content, Source(f"`{path}`", "line"))


def require_file(name: str, path: str | Path | None) -> None:
    """Raises `InputError` naming an argument, if it is given and not a file."""
    if path is None or Path(path).is_file():
        return
    found = "which is a folder" if Path(path).is_dir() else "and there is none"
    raise InputError(f"`{name}` must be a file, got {brief(str(path))}, {found}.")


def read_line(content: bytes, source: Source, number: int) -> Record:
    """Returns the object of a line of a `.jsonl` file.

    Raises:
      InputError: as `read_rows`, with the line.
    """
    return _object(source.at(number), _decoded(content, source, number))


def _decoded(content: bytes, source: Source, first: int = 1) -> str:
    """Returns lines of a file as text; the first has some number."""
    text, wrong = "", content.find(b"\0")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = content.count(b"\n", 0, wrong) + first
        raise InputError(
            f"{source.at(line)} must be UTF-8, got the byte 0x{content[wrong]:02x}. "
            "Convert the file to UTF-8."
        )
    return text


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
    first = number, columns = next(lines, (1, []))
    if columns and task.headerless and not {*columns} & {*task.text_a, *task.label}:
        lines, columns = itertools.chain([first], lines), list(task.headerless)
    if task.drops_short_rows:
        lines = (line for line in lines if len(line[1]) >= len(columns))
    yield from _table(source, number, columns, lines)


def _comma_separated(text: str, source: Source) -> Numbered:
    """Yields the rows of a CSV text; a row's line is its last one."""
    header = text.partition("\n")[0].removesuffix("\r")
    # As spreadsheets write where the comma is the decimal point.
    if "," not in header and (";" in header or "\t" in header):
        raise InputError(
            f"{source.at(1)} must name the columns with commas between them, got "
            f"{brief(header)}. Write the file with commas."
        )
    rows = iter(_csv_rows(text, source))
    yield from _table(source, *next(rows, (1, [])), rows)


def _table(
    source: Source,
    number: int,
    columns: list[str],
    rows: Iterable[tuple[int, list[str]]],
) -> Numbered:
    """Yields rows by column, after the header of some number."""
    # Spreadsheets leave empty names at the end of a header.
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{source.at(number)} must name every column once, got {brief(twice)} "
            f"{columns.count(twice)} times. Rename or remove one of them."
        )
    for number, values in rows:
        if len(values) != len(columns):
            raise InputError(
                f"{source.at(number)} must have {len(columns)} fields "
                f"({listed(columns)}), got {len(values)}."
            )
        yield number, dict(zip(columns, values, strict=True))


def _csv_rows(text: str, source: Source) -> list[tuple[int, list[str]]]:
    """Returns the rows of a CSV text that are not blank, with their last lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    # The limit is one for all of Python, so it is put back.
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return [(reader.line_num, values) for values in reader if values]
    except csv.Error as error:
        raise InputError(
            f"{source.at(reader.line_num)} must be CSV: {error}. "
            "Write a quote inside a field twice."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _json_lines(text: str, source: Source) -> Numbered:
    """Yields the objects of a text with one in each line."""
    for number, line in _lines(text):
        yield number, _object(source.at(number), line)


def _object(place: str, line: str) -> Record:
    """Returns the object of a line."""
    try:
        value = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} must be a JSON object: {_reason(error)}.") from error
    return as_record(place, value)


def _json_list(text: str, source: Source) -> Numbered:
    """Yields the objects of a JSON list."""
    try:
        values = _DECODER.decode(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        place, remedy = _place_in_list(text, source), ""
        if isinstance(error, json.JSONDecodeError):
            place = f"{source.name} line {error.lineno}"
            remedy = " Objects in lines belong in a `.jsonl` file."
        raise InputError(f"{place} must be JSON: {_reason(error)}.{remedy}") from error
    if not isinstance(values, list):
        raise InputError(
            f"{source.name} must be a list of objects, got {type(values).__name__}."
        )
    for number, value in enumerate(values, start=1):
        yield number, as_record(source.at(number), value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns an object; of two values of one key Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {brief(twice)} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    # Python reads no integer of more than 4,300 digits, and advises programmers.
    return str(error).partition(";")[0]


def _place_in_list(text: str, source: Source) -> str:
    """Returns the item of a list that is no JSON, or the file if none is found."""
    end, number = text.find("[") + 1, 0
    while end:
        number += 1
        while end < len(text) and text[end] in _BETWEEN:
            end += 1
        try:
            _, end = _DECODER.raw_decode(text, end)
        except json.JSONDecodeError:
            break
        except (ValueError, RecursionError):
            return source.at(number)
    return source.name


def as_record(place: str, value: object) -> Record:
    """Returns a row; raises `InputError` if it is no mapping."""
    if not isinstance(value, Mapping):
        raise InputError(f"{place} must be an object, got {type(value).__name__}.")
    return value


_OBJECTS = MappingProxyType({".json": _json_list, JSON_LINES: _json_lines})
SUFFIXES = (".tsv", ".txt", ".csv", *_OBJECTS, PARQUET)
