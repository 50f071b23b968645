"""Labels: what stands in the data as a class, a set of classes, or a value."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from sparse_jax.data.examples import Columns, Examples
from sparse_jax.data.glue import TASKS, Task
from sparse_jax.errors import InputError, brief, listed

__all__ = [
    "class_numbers",
    "flag_count",
    "has_labels",
    "is_unlabeled",
    "labels_of_flags",
    "named_labels",
    "number_labels",
    "resolved",
    "without_unlabeled",
]

# SNLI has these where the annotators disagree, test files where labels are withheld.
_MARKS = ("-", "-1", "-1.0")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# pandas writes whole numbers like this if a value of the column is missing.
_WITH_POINT = re.compile(r"(-?)(0|[1-9]\d{0,3999})\.0+")
_REMEDY = "Leave out such rows with `drop_unlabeled` (--drop-unlabeled)."

Words = Mapping[str, int]


def is_unlabeled(label: object, task: Task) -> bool:
    """Says whether a label means that there is none.

    These are null, NaN and an empty text; `-` and, of classes, -1.

    Example:
      >>> [is_unlabeled(label, TASKS["mnli"]) for label in (None, "-", -1, 0)]
      [True, True, True, False]
    """
    if _is_missing(label):
        return True
    is_mark = not isinstance(label, list | dict) and _word(label) in _MARKS
    return is_mark and (not task.is_regression or _word(label) == "-")


def has_labels(columns: Columns) -> bool:
    """Says whether any row has a label; test files often have none or -1."""
    # Of values too: a test file says -1 where labels are withheld.
    classes = TASKS["classification"]
    return not all(is_unlabeled(label, classes) for label in columns.labels)


def resolved(task: Task, train: Columns) -> Task:
    """Returns the task that the labels of one's own data are for.

    Lists are sets of labels, and numbers that are not all whole are values.
    """
    if task.labels is not None or task.is_multilabel:
        return task
    labels = [label for label in train.labels if not is_unlabeled(label, task)]
    if any(isinstance(label, list) for label in labels):
        return TASKS["multilabel"]
    found = [_number(label, train.source.has_types) for label in labels]
    numbers = [number for number in found if number is not None]
    if len(numbers) == len(labels) and any(number % 1 for number in numbers):
        return TASKS["regression"]
    return task


def class_numbers(task: Task, train: Columns) -> dict[str, int]:
    """Returns the class of every word that may stand as a label.

    A task of GLUE accepts names and numbers. Other labels are those of the training
    data: sorted, as numbers if all of them are whole numbers.

    Raises:
      InputError: if a label is absent or no word, or if there are fewer than two.
    """
    if task.labels is not None:
        words = {str(i): i for i in range(len(task.labels))}
        return words | {name: i for i, name in enumerate(task.labels)}
    names: set[str] = set()
    for place, label in _placed(train):
        names.update(_set(place, label) if task.is_multilabel else [_one(place, label)])
    if all(_is_whole(name) or _WITH_POINT.fullmatch(name) for name in names):
        names = {_without_point(name) for name in names}
    if len(names) < (1 if task.is_multilabel else 2):
        raise InputError(
            f"{train.source.name} must have at least two labels in `label`, "
            f"got {listed(sorted(names)) or 'none'}."
        )
    ordered = sorted(names, key=int if all(map(_is_whole, names)) else str)
    return {name: i for i, name in enumerate(ordered)}


def number_labels(columns: Columns, task: Task, words: Words) -> Examples:
    """Returns examples with their labels as numbers.

    They are values float32 `[N]` of a regression, 0 or 1 for every label float32
    `[N, C]` if any number of labels fit an example, and else classes int32 `[N]`.

    Raises:
      InputError: if a label is absent or unknown, with its row.
    """
    if task.is_regression:
        values = [_value(place, label) for place, label in _placed(columns)]
        labels = np.array(values, np.float32)
    elif task.is_multilabel:
        labels = np.zeros((len(columns.labels), len({*words.values()})), np.float32)
        for row, (place, label) in enumerate(_placed(columns)):
            for name in _set(place, label):
                labels[row, _class(place, name, words)] = 1
    else:
        classes = [_class(place, label, words) for place, label in _placed(columns)]
        labels = np.array(classes, np.int32)
    given = columns.weights
    weights = None if given is None else np.array(given, np.float32)
    return Examples(columns.text_a, columns.text_b, labels, weights)


def named_labels(columns: Columns, task: Task, words: Words) -> list[object]:
    """Returns labels as predictions have them: names of classes, and values.

    An entry is None where there is no label; an unknown label stands as in the data.

    Example:
      >>> from sparse_jax.data.read_rows import Source
      >>> given = [1, "1.0", "negative", None, -1, "?"]
      >>> columns = Columns(Source("`a.csv`", "line"), [], [], None, given)
      >>> words = {"0": 0, "1": 1, "negative": 0, "positive": 1}
      >>> named_labels(columns, TASKS["sst2"], words)
      ['positive', 'positive', 'negative', None, None, '?']
    """

    def named(label: object) -> object:
        if isinstance(label, list):
            return [named(one) for one in label]
        word = _word(label)
        found = words.get(word, words.get(_without_point(word)))
        if found is not None and not _is_missing(label):
            return (task.labels or ())[found]
        if is_unlabeled(label, task):
            return None
        value = _number(label, has_types=False) if task.is_regression else None
        return label if value is None else value

    return [named(label) for label in columns.labels]


def without_unlabeled(columns: Columns, task: Task) -> tuple[Columns, str | None]:
    """Returns the rows that have a label, and what to say about the others."""
    kept = [i for i, x in enumerate(columns.labels) if not is_unlabeled(x, task)]
    if len(kept) == len(columns.labels):
        return columns, None
    if not kept:
        raise InputError(
            f"{columns.source.name} must have labeled examples, got none in "
            f"{len(columns.labels):,} rows."
        )
    others = Counter(
        "no label" if _is_missing(label) else f"the label {_word(label)}"
        for label in columns.labels
        if is_unlabeled(label, task)
    )
    counts = ", ".join(f"{count:,} with {what}" for what, count in others.items())
    remark = (
        f"{columns.source.name}: {others.total():,} of {len(columns.labels):,} rows "
        f"are dropped as unlabeled, {counts}."
    )
    return columns.take(kept), remark


def flag_count(train: Columns) -> int:
    """Returns the number of labels if each example has a list of 0 or 1 for every one.

    It is 0 if the lists are of labels: they differ in length, or have other members.
    """
    lists = [label for label in train.labels if isinstance(label, list)]
    count = len(lists[0]) if lists else 0
    are_flags = all(len(one) == count and all(map(_is_flag, one)) for one in lists)
    return count if are_flags and count > 1 else 0


def labels_of_flags(columns: Columns, count: int) -> Columns:
    """Returns columns whose lists of 0 and 1 are lists of the positions of the 1s.

    Raises:
      InputError: if a list is another one, with its row.
    """
    labels = []
    for place, label in _placed(columns):
        is_list = isinstance(label, list)
        if is_list and not (len(label) == count and all(map(_is_flag, label))):
            raise InputError(
                f"{place} must have a list of {count} labels that are 0 or 1, as the "
                f"training data have, got {brief(label)}."
            )
        labels.append([i for i, flag in enumerate(label) if flag] if is_list else label)
    return columns._replace(labels=labels)


def _placed(columns: Columns) -> Iterator[tuple[str, object]]:
    """Yields the labels with their places."""
    for number, label in zip(columns.numbers, columns.labels, strict=True):
        yield columns.source.at(number), label


def _set(place: str, label: object) -> list[str]:
    """Returns the words of a list of labels."""
    _require_label(place, label)
    if not isinstance(label, list):
        raise InputError(
            f"{place} must have a list of labels, got {brief(label)}. Write the data "
            "as JSON, with an empty list where no label fits."
        )
    words = [_one(place, one) for one in label]
    if len({*words}) < len(words):
        raise InputError(f"{place} must have no label twice, got {brief(label)}.")
    return words


def _one(place: str, label: object) -> str:
    """Returns the word of a single label."""
    _require_label(place, label)
    is_finite = not isinstance(label, float) or math.isfinite(label)
    if not isinstance(label, str | int | float) or not is_finite:
        raise InputError(
            f"{place} must have a word or a number as its label, got {brief(label)}. "
            "Lists of them, in every row, are the task multilabel."
        )
    return _word(label)


def _class(place: str, label: object, words: Words) -> int:
    """Returns the class of a label."""
    word = _one(place, label)
    found = words.get(word, words.get(_without_point(word)))
    if found is None:
        is_mark = word in _MARKS
        raise InputError(
            f"{place} must have one of the labels {listed(words)}, got {brief(label)}."
            + (f" {_REMEDY}" if is_mark else "")
        )
    return found


def _value(place: str, label: object) -> float:
    """Returns the value of a label."""
    _require_label(place, label)
    value = _number(label, has_types=False)
    # A loss is computed in float32.
    if value is None or abs(value) > float(np.finfo(np.float32).max):
        raise InputError(
            f"{place} must have a number as its label, got {brief(label)}."
            + (f" {_REMEDY}" if label == "-" else "")
        )
    return float(value)


def _require_label(place: str, label: object) -> None:
    """Raises if there is no label."""
    if _is_missing(label):
        raise InputError(f"{place} must have a label, got {brief(label)}. {_REMEDY}")


def _is_missing(label: object) -> bool:
    """Says whether a label is null, NaN or an empty text."""
    if isinstance(label, str):
        return label.strip().lower() in ("", "nan")
    return label is None or (isinstance(label, float) and math.isnan(label))


def _is_flag(value: object) -> bool:
    """Says whether a member of a list is the number 0 or 1."""
    return isinstance(value, int | float) and value in (0, 1)


def _number(label: object, has_types: bool) -> int | float | None:
    """Returns the number that a label is, None if it is none.

    In a file without types, such as CSV, words are numbers if they can be read as such.
    """
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    if isinstance(label, str):
        is_short = len(label) <= 400
        is_number = is_short and not has_types and _NUMBER.fullmatch(label.strip())
        label = float(label) if is_number else math.nan
    return label if isinstance(label, int) or math.isfinite(label) else None


def _word(label: object) -> str:
    """Returns a label as a word; a whole number has no decimals."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def _is_whole(word: str) -> bool:
    """Says whether a word is a whole number in its usual spelling."""
    digits = word.removeprefix("-")
    # Python reads no more digits.
    return digits.isdecimal() and len(digits) <= 4000 and str(int(word)) == word


def _without_point(word: str) -> str:
    """Returns a whole number such as 1.0 in its usual spelling, other words as is."""
    found = _WITH_POINT.fullmatch(word)
    return str(int(found[1] + found[2])) if found else word
