"""Examples: texts and labels, as they stand in rows and with labels as numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparse_jax.data.batches import random_of
from sparse_jax.data.glue import Task
from sparse_jax.data.read_rows import WEIGHT, Record, Rows, Source
from sparse_jax.errors import InputError, brief, listed

__all__ = [
    "Columns",
    "Examples",
    "Splits",
    "choose_held_out",
    "hold_out",
    "read_columns",
    "text_of",
    "weight_of",
]

_HEAVIEST = 1e30  # the loss is computed in float32

# Other random numbers than those of the first epoch.
_HOLDING_OUT = 2


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts, or pairs of texts, and their labels.

    Example:
      >>> len(Examples(["Yes.", "No."], None, np.array([1, 0], np.int32)))
      2
    """

    text_a: list[str]
    text_b: list[str] | None  # None if the examples are single texts
    # shape=(N,), int32 classes or float32 values; shape=(N, C), 0 or 1, if multi-label
    labels: np.ndarray
    weights: np.ndarray | None = None  # shape=(N,), float32, of the loss; None: all 1

    def __len__(self) -> int:
        return len(self.text_a)

    def take(self, numbers: Sequence[int]) -> "Examples":
        """Returns some of the examples."""
        some = lambda texts: texts and [texts[i] for i in numbers]
        weights = None if self.weights is None else self.weights[[*numbers]]
        labels = self.labels[[*numbers]]
        return Examples(some(self.text_a), some(self.text_b), labels, weights)


@dataclass(frozen=True, eq=False)
class Splits(Mapping[str, Examples]):
    """The training examples of a task and those that predictions are evaluated on.

    A mapping from the names of the splits, of which the first is "train".
    """

    task: Task  # with the names of the labels, also those read from the data
    examples: Mapping[str, Examples]
    notes: tuple[str, ...] = ()  # how the data were read
    warnings: tuple[str, ...] = ()  # what is odd about them

    def __getitem__(self, name: str) -> Examples:
        return self.examples[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def train(self) -> Examples:
        """The training examples."""
        return self.examples["train"]

    @property
    def evaluation(self) -> dict[str, Examples]:
        """The other splits; the first is the one to choose a model by."""
        return {name: self[name] for name in self if name != "train"}


class Columns(NamedTuple):
    """Texts and labels as they stand in the data."""

    source: Source
    numbers: list[int]  # of the rows, for messages
    text_a: list[str]
    text_b: list[str] | None  # None if the examples are single texts
    labels: list[object]  # None where there is no label
    weights: list[float] | None = None  # of the rows in the loss; None: all 1

    def take(self, rows: Sequence[int]) -> "Columns":
        """Returns some of the rows."""
        text_b = self.text_b
        return Columns(
            self.source,
            [self.numbers[i] for i in rows],
            [self.text_a[i] for i in rows],
            None if text_b is None else [text_b[i] for i in rows],
            [self.labels[i] for i in rows],
            self.weights and [self.weights[i] for i in rows],
        )


def choose_held_out(
    total: int, share: float, seed: int, where: str, classes: Sequence[str] = ()
) -> list[int]:
    """Returns the numbers of the examples that are held out, ascending.

    Args:
      total: examples, of which at least one stays on either side.
      share: fraction of them below 1, else their number.
      seed: not negative.
      where: the file, for messages.
      classes: of the examples; each has the same share of them held out, and one stays.

    Raises:
      InputError: if there are too few examples.

    Example:
      >>> len(choose_held_out(40, 0.1, 0, "`a.csv`"))
      4
    """
    size = max(round(share * total), 1) if share < 1 else int(share)
    if total < 2 or (share >= 1 and size >= total):
        raise InputError(
            f"{where} must have at least {max(size, 1) + 1} examples to hold "
            f"{'one' if size <= 1 else size} out, got {total}. Pass a folder with a "
            "file `train.jsonl` and a file `validation.jsonl`."
        )
    order = random_of(seed, 0, _HOLDING_OUT).permutation(total)
    if not classes:
        return sorted(order[: min(size, total - 1)].tolist())
    # One class after the other, each without its first, and from there evenly spaced.
    order = sorted(order.tolist(), key=lambda i: str(classes[i]))
    follows = zip(order[1:], order, strict=False)
    spare = [i for i, before in follows if classes[i] == classes[before]]
    if not spare:
        raise InputError(
            f"{where} must have two examples of a label to hold one out, got {total} "
            "examples of as many labels. Pass a folder with a file for each split."
        )
    size = min(size, len(spare))
    return sorted(spare[int((i + 0.5) * len(spare) / size)] for i in range(size))


def hold_out(
    columns: Columns, share: float, seed: int, *, is_stratified: bool
) -> tuple[Columns, Columns]:
    """Returns the rows to train on, and those held out.

    Args:
      columns: of a single file.
      share: fraction of the rows below 1, else their number.
      seed: of the choice.
      is_stratified: whether labels are classes, each of which has its share held out.

    Raises:
      InputError: if there are too few rows.
    """
    classes = [str(label) for label in columns.labels] if is_stratified else []
    total, where = len(columns.labels), columns.source.name
    chosen = choose_held_out(total, share, seed, where, classes)
    rest = sorted({*range(total)} - {*chosen})
    return columns.take(rest), columns.take(chosen)._replace(weights=None)


def read_columns(rows: Rows, task: Task, *, needs_labels: bool = True) -> Columns:
    """Returns the columns that a task needs, and the weights of rows that have any.

    Raises:
      InputError: if there is no row, a column is absent, or is there under two names
        with different values, a text is no string, or a weight is not positive.
    """
    numbers, text_a, labels, weights = [], [], [], []
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
        if rows.is_weighted:
            weights.append(weight_of(place, fields))
    _require_uniform(rows.source, numbers, text_b)
    pairs = [text for text in text_b if text is not None]
    weights = weights or None
    return Columns(rows.source, numbers, text_a, pairs or None, labels, weights)


def weight_of(place: str, fields: Record) -> float:
    """Returns the weight of a row in the loss.

    Raises:
      InputError: if it is not a positive number.
    """
    value = fields.get(WEIGHT)
    try:
        weight = float(value) if isinstance(value, str | int | float) else math.nan
    # An integer may be more than any number with a fraction.
    except (ValueError, OverflowError):
        weight = math.nan
    if isinstance(value, bool) or not 0 < weight < _HEAVIEST:
        raise InputError(
            f"{place} must have a positive number as its weight, got {brief(value)}. "
            "Leave out rows that are not trained on."
        )
    return weight


def _has_text_b(fields: Record, task: Task) -> bool:
    """Says whether a row must have a second text."""
    if task.has_optional_text_b:
        return any(fields.get(name) is not None for name in task.text_b)
    return bool(task.text_b)


def text_of(place: str, fields: Record, names: tuple[str, ...]) -> str:
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


def _value(place: str, fields: Record, names: tuple[str, ...]) -> object:
    """Returns the value under the first of some names that has one, or None."""
    found = [name for name in names if fields.get(name) is not None]
    for name in found[1:]:
        if str(fields[name]) != str(fields[found[0]]):
            raise InputError(
                f"{place} must have one of {_either((found[0], name))}, got both with "
                "different values. Remove or rename the one that is not meant."
            )
    return fields[found[0]] if found else None


def _require(place: str, fields: Record, names: tuple[str, ...]) -> None:
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
        raise InputError(f"{source.name} must have examples, got none.")
    for number, text in zip(numbers, text_b, strict=True):
        if (text is None) != (text_b[0] is None):
            raise InputError(
                f"{source.at(number)} must have a second text exactly if the rows "
                "before it do. Write the same columns in every row."
            )
