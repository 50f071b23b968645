"""The rows of `metrics.jsonl`: updates, evaluations, skipped batches, a selection."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from statistics import mean
from typing import Any

__all__ = [
    "MetricRows",
    "evaluations_of",
    "is_evaluation",
    "outcome_warnings",
    "selection_seconds",
    "skipped_at_end",
    "updates_of",
]

MetricRows = Sequence[Mapping[str, Any]]

_MOST_AVERAGED = 50  # updates at the beginning and at the end
_GUESSING = 0.9  # share of the vocabulary: fewer tokens mean that something was learned


def updates_of(rows: MetricRows) -> list[Mapping[str, Any]]:
    """Returns the rows of updates, without batches that were skipped.

    Example:
      >>> rows = [{"step": 1, "loss": 2.0}, {"step": 1, "split": "test", "loss": 3.0}]
      >>> updates_of(rows)
      [{'step': 1, 'loss': 2.0}]
    """
    return [row for row in rows if "loss" in row and not is_evaluation(row)]


def evaluations_of(rows: MetricRows) -> list[Mapping[str, Any]]:
    """Returns the rows of evaluations, one for each split."""
    return [row for row in rows if is_evaluation(row)]


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Returns whether a row is that of an evaluation."""
    return "split" in row


def skipped_at_end(rows: MetricRows) -> int:
    """Returns how many of the last batches were skipped, one after the other.

    Example:
      >>> skipped_at_end([{"step": 1, "loss": 2.0}, {"step": 2, "is_skipped": True}])
      1
    """
    batches = (row for row in reversed(rows) if "loss" in row or "is_skipped" in row)
    of_training = (row for row in batches if not is_evaluation(row))
    return sum(1 for _ in takewhile(lambda row: "is_skipped" in row, of_training))


def selection_seconds(rows: MetricRows) -> float | None:
    """Returns how long the selection took, None if there was none.

    Example:
      >>> selection_seconds([{"step": 1, "is_selection": True, "seconds": 2.5}])
      2.5
    """
    found = [row["seconds"] for row in rows if row.get("is_selection")]
    return sum(found) if found else None


def outcome_warnings(
    rows: MetricRows, results: Mapping[str, Mapping[str, float]], vocab_size: int
) -> Iterator[str]:
    """Yields a line for whatever looks like training that went wrong.

    Args:
      rows: lines of `metrics.jsonl`.
      results: the last metrics of every evaluation split.
      vocab_size: tokens of the model.

    Example:
      >>> rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]
      >>> [line.split(":")[0] for line in outcome_warnings(rows, {}, 100)]
      ['the loss ends at 2.5, above 1 where it began']
    """
    # Earlier versions wrote a null for one that is not finite.
    losses = [row["loss"] for row in updates_of(rows) if row["loss"] is not None]
    width = min(_MOST_AVERAGED, max(1, len(losses) // 3))
    first, last = (mean(part or [0.0]) for part in (losses[:width], losses[-width:]))
    averaged = f" (means of {width} updates)" if width > 1 else ""
    # A loss that explodes at once raises the first mean too, but not the first loss.
    if losses and all(loss > 2 * losses[0] for loss in losses[-width:]):
        first, averaged = losses[0], ""
    if last > first:
        yield (
            f"the loss ends at {last:.4g}, above {first:.4g} where it began{averaged}: "
            "the run has not learned, or diverged. Lower --learning-rate."
        )
    if in_a_row := skipped_at_end(rows):
        yield f"batches skipped at the end, as their loss is not finite: {in_a_row}."
    for split, metrics in results.items():
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            yield f"{split}: not finite: {', '.join(bad)}."
        perplexity = metrics.get("perplexity", 0.0)
        if perplexity > _GUESSING * vocab_size:
            yield (
                f"{split}: the perplexity is {perplexity:,.0f}, and that of guessing "
                f"is {vocab_size:,}, the tokens of the vocabulary."
            )
