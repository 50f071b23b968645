"""Warnings about labeled data that looks wrong, in one line each."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from sparse_jax.data.examples import Examples
from sparse_jax.data.glue import Task
from sparse_jax.errors import brief, listed

__all__ = ["kind_of", "oddities"]

# Of the examples of an evaluation split. The genuine files of GLUE share a few.
_SHARED = 0.1


def kind_of(asked: Task, task: Task, train: Examples, are_flags: bool) -> str:
    """Returns how the labels of one's own data were read.

    Args:
      asked: the task that was asked for.
      task: the task that the labels are for, with their names.
      train: the training examples.
      are_flags: whether lists are 0 or 1 for every label.
    """
    if task.is_regression:
        low, high = float(train.labels.min()), float(train.labels.max())
        what = f"numbers from {low:.6g} to {high:.6g}"
    else:
        labels = task.labels or ()
        what = f"{len(labels):,} {'labels' if task.is_multilabel else 'classes'}, "
        what += listed(labels)
    how = " (lists of 0 or 1 for every label)" if are_flags else ""
    other = "" if task.name == asked.name else f", so the task is {task.name}"
    return f"labels of {len(train):,} training examples: {what}{how}{other}."


def oddities(task: Task, examples: Mapping[str, Examples]) -> Iterator[str]:
    """Yields what may be wrong with data that can be used.

    Args:
      task: with the names of the labels.
      examples: by split, "train" first.
    """
    train = examples["train"]
    for name, part in examples.items():
        empty = sum(not text.strip() for text in part.text_a)
        if empty:
            yield f"{name}: {empty:,} of {len(part):,} examples have an empty text."
        if name != "train":
            yield from _shared(name, train, part)
        if task.is_regression and len(part) > 1 and np.ptp(part.labels) == 0:
            yield f"{name}: all {len(part):,} examples have the label {part.labels[0]}."
    if not task.is_regression:
        yield from _alike(task)
        yield from _unused(task, examples)


def _shared(name: str, train: Examples, part: Examples) -> Iterator[str]:
    """Yields how many examples of a split were trained on, if they are many."""
    known = set(_keys(train))
    count = sum(key in known for key in _keys(part))
    if count > _SHARED * len(part):
        yield (
            f"{name}: {count:,} of {len(part):,} examples are training examples too, "
            "so its metrics say little about other data."
        )


def _keys(part: Examples) -> Iterator[tuple[str, str | None]]:
    """Yields the texts of the examples."""
    return zip(part.text_a, part.text_b or [None] * len(part), strict=True)


def _alike(task: Task) -> Iterator[str]:
    """Yields labels that differ in case or spaces alone, and that may mean none."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for label in task.labels or ():
        spellings["".join(label.casefold().split())].append(label)
    for same in spellings.values():
        if len(same) > 1:
            yield f"the labels {', '.join(map(brief, same))} are different classes."
    if task.name == "classification" and len(task.labels or ()) > 2:
        for mark in {"-", "-1"} & {*(task.labels or ())}:
            yield (
                f"the label {mark} is a class. Pass --drop-unlabeled if it means that "
                "there is no label."
            )


def _unused(task: Task, examples: Mapping[str, Examples]) -> Iterator[str]:
    """Yields the labels that a split does not have, and classes that are too many."""
    labels = task.labels or ()
    for name, part in examples.items():
        if task.is_multilabel:
            found = np.flatnonzero(part.labels.any(axis=0))
        else:
            found = np.unique(part.labels)
        lacking = [
            label for i, label in enumerate(labels) if i not in {*found.tolist()}
        ]
        if lacking and name == "train":
            yield f"{name}: no example has the label {listed(lacking)}."
        elif len(found) == 1 and len(part) > 1 and not task.is_multilabel:
            only = listed([labels[int(found[0])]])
            yield f"{name}: all {len(part):,} examples have the label {only}."
    size = len(examples["train"])
    if task.name == "classification" and size >= 20 and len(labels) > size / 2:
        yield (
            f"there are {len(labels):,} classes in {size:,} training examples. Pass "
            "the task regression if the labels are numbers to predict."
        )
