"""The rows of `metrics.jsonl`: updates, evaluations, skipped batches, a selection."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

__all__ = [
    "Rows",
    "evaluations_of",
    "is_evaluation",
    "selection_seconds",
    "skipped_at_end",
    "updates_of",
]

Rows = Sequence[Mapping[str, Any]]


def updates_of(rows: Rows) -> list[Mapping[str, Any]]:
    """Returns the rows of updates, without batches that were skipped.

    Example:
      >>> rows = [{"step": 1, "loss": 2.0}, {"step": 1, "split": "test", "loss": 3.0}]
      >>> updates_of(rows)
      [{'step': 1, 'loss': 2.0}]
    """
    return [row for row in rows if "loss" in row and not is_evaluation(row)]


def evaluations_of(rows: Rows) -> list[Mapping[str, Any]]:
    """Returns the rows of evaluations, one for each split."""
    return [row for row in rows if is_evaluation(row)]


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Returns whether a row tells how good a model is."""
    return "split" in row


def skipped_at_end(rows: Rows) -> int:
    """Returns how many of the last batches were skipped, one after the other.

    Example:
      >>> skipped_at_end([{"step": 1, "loss": 2.0}, {"step": 2, "is_skipped": True}])
      1
    """
    batches = (row for row in reversed(rows) if "loss" in row or "is_skipped" in row)
    of_training = (row for row in batches if not is_evaluation(row))
    return sum(1 for _ in takewhile(lambda row: "is_skipped" in row, of_training))


def selection_seconds(rows: Rows) -> float | None:
    """Returns how long the selection took, None if there was none.

    Example:
      >>> selection_seconds([{"step": 1, "is_selection": True, "seconds": 2.5}])
      2.5
    """
    found = [row["seconds"] for row in rows if row.get("is_selection")]
    return sum(found) if found else None
