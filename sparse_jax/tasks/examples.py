"""Examples: texts with their labels as numbers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.tasks.columns import Columns
from sparse_jax.tasks.glue import Task

__all__ = ["Examples", "Splits", "class_numbers", "number_labels"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts, or pairs of texts, and their labels.

    Example:
      >>> len(Examples(["Yes.", "No."], None, np.array([1, 0], np.int32)))
      2
    """

    text_a: list[str]
    text_b: list[str] | None  # None if the examples are single texts
    labels: np.ndarray  # shape=(N,), int32 classes or float32 values

    def __len__(self) -> int:
        return len(self.text_a)


@dataclass(frozen=True, eq=False)
class Splits(Mapping[str, Examples]):
    """The training examples of a task and those that predictions are judged on.

    A mapping from the names of the splits, of which the first is "train".
    """

    task: Task  # with the names of the labels, also those read from the data
    examples: Mapping[str, Examples]

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


def class_numbers(task: Task, train: Columns) -> dict[str, int]:
    """Returns the class of every word that may stand as a label.

    A task of GLUE accepts names and numbers. Other labels are those of the training
    data: sorted, as numbers if all of them are whole numbers.

    Raises:
      InputError: if the training data have fewer than two labels.
    """
    if task.labels is not None:
        words = {str(i): i for i in range(len(task.labels))}
        return words | {name: i for i, name in enumerate(task.labels)}
    names = {_word(label) for label in train.labels if label is not None} - {""}
    if len(names) < 2:
        raise InputError(
            f"{train.source.name} must have at least two labels in `label`, "
            f"got {', '.join(sorted(names)) or 'none'}."
        )
    ordered = sorted(names, key=int if all(map(_is_whole, names)) else str)
    return {name: i for i, name in enumerate(ordered)}


def number_labels(columns: Columns, words: Mapping[str, int]) -> Examples:
    """Returns examples whose labels are classes, or values if there are no `words`.

    Raises:
      InputError: if a label is absent or unknown, with its row.
    """
    convert, dtype = (_class, np.int32) if words else (_value, np.float32)
    labels = [
        convert(columns.source.at(number), label, words)
        for number, label in zip(columns.numbers, columns.labels, strict=True)
    ]
    return Examples(columns.text_a, columns.text_b, np.array(labels, dtype))


def _class(place: str, label: Any, words: Mapping[str, int]) -> int:
    """Returns the class of a label."""
    if (word := _word(label)) not in words:
        raise InputError(
            f"{place} must have one of the labels {', '.join(words)}, got "
            f"{'none' if label is None else repr(label)}."
        )
    return words[word]


def _value(place: str, label: Any, words: Mapping[str, int]) -> float:
    """Returns the value of a label."""
    del words
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{place} must have a number as its label, got {label!r}.")
    return value


def _word(label: Any) -> str:
    """Returns a label as a word."""
    return str(label).strip()


def _is_whole(word: str) -> bool:
    """Says whether a word is a whole number in its usual spelling."""
    return word.removeprefix("-").isdecimal() and str(int(word)) == word
