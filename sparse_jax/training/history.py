"""The rows of `metrics.jsonl`: updates and evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Rows", "evaluations_of", "is_evaluation", "updates_of"]

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
