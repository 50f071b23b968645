"""Rows of a data set of the Hugging Face Hub."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sparse_jax.errors import InputError, listed
from sparse_jax.models.labelled_head import order_of
from sparse_jax.tasks.glue import Task
from sparse_jax.tasks.rows import Rows, Source

__all__ = ["fetch_rows", "is_hub_name"]

_GLUE = "nyu-mll/glue"


def is_hub_name(name: str) -> bool:
    """Says whether a word has the form of a data set's name, `owner/name`.

    Example:
      >>> is_hub_name("nyu-mll/glue"), is_hub_name("./glue"), is_hub_name("glue")
      (True, False, False)
    """
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def fetch_rows(task: Task, name: str | None) -> dict[str, Callable[[], Rows]]:
    """Returns readers of the splits of a data set, the training one first.

    Args:
      task: says which splits count, and which configuration of GLUE.
      name: `owner/name`; None is `nyu-mll/glue`.

    Raises:
      InputError: if the data set cannot be fetched or has no split "train".
    """
    splits = _fetch(task, name or _GLUE)
    readers = {}
    for split in ("train", *task.evaluation):
        # The Hub calls the main evaluation of MNLI "validation_matched".
        for theirs in (split, f"{split}_matched"):
            if theirs in splits and split not in readers:
                source = Source(f"`{name or _GLUE}` {theirs}", "row")
                readers[split] = partial(_rows, source, splits[theirs], task)
    if "train" not in readers:
        raise InputError(
            f"`{name or _GLUE}` must have a split `train`, got {listed(splits)}."
        )
    return readers


def _fetch(task: Task, name: str) -> Any:
    """Returns a data set's splits by name."""
    # datasets takes seconds to import, so it is imported where it is used.
    from datasets import load_dataset

    configuration = task.name if name == _GLUE else None
    try:
        return load_dataset(name, configuration)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"`data` must be a folder or a data set on the Hugging Face Hub, got "
            f"{name!r}, which is no folder and cannot be fetched: {reason}. Check the "
            "spelling and the connection, or download the files and pass their folder."
        ) from error


def _rows(source: Source, split: Any, task: Task) -> Rows:
    """Returns the rows of one split, whose classes may be numbered in another order."""
    rows: Iterable[dict[str, Any]] = split
    for column in task.label:
        feature = (getattr(split, "features", None) or {}).get(column)
        order = order_of(task.labels or (), getattr(feature, "names", None) or ())
        if order:
            rows = map(partial(_renumbered, column, order), rows)
    return Rows(source, enumerate(rows))


def _renumbered(
    column: str, order: tuple[int, ...], row: dict[str, Any]
) -> dict[str, Any]:
    """Returns a row with the number that a task gives to its class."""
    label = row[column]
    return {**row, column: order.index(label) if label in order else label}
