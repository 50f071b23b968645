"""The files of a run: JSON, validated when read, and what rows of metrics say."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import mean, variance
from typing import Any, NoReturn

from sparse_jax.adapter.file import replacing
from sparse_jax.errors import InputError, brief, reason_of

__all__ = [
    "MetricRows",
    "Row",
    "evaluations_of",
    "is_evaluation",
    "outcome_warnings",
    "read_json",
    "read_metrics",
    "read_rows",
    "row_line",
    "selection_seconds",
    "skipped_at_end",
    "updates_of",
    "write_json",
    "write_text",
]

# A line of `metrics.jsonl`: an update, an evaluation, a skipped batch, a selection.
Row = Mapping[str, Any]
MetricRows = Sequence[Row]

_REMEDY = "Put it back, or pass `overwrite=True` to start over."
# Of `metrics.json`.
_COUNTS = (
    "adapter_bytes", "optimizer_bytes", "peak_memory_bytes", "seconds_per_step",
    "skipped_batches", "steps", "total_parameters", "trained_parameters",
    "trained_parameters_without_head",
)  # fmt: skip
_LARGEST = 2.0**1000
_OF_UPDATES = ("seconds", "tokens", "is_compiling")  # beside the loss, null or not
_OF_EVALUATIONS = ("split", "report")  # are no numbers


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file.

    Raises:
      InputError: if it cannot be read, or is something else.
    """
    return _parse(f"`{path}`", _read(path))


def read_metrics(path: Path) -> dict[str, Any]:
    """Returns what a `metrics.json` holds.

    Raises:
      InputError: if it cannot be read, or is not that of a finished run.
    """
    metrics = read_json(path)
    for name in _COUNTS:
        least = 1 if name == "total_parameters" else 0
        if not (_is_number(metrics.get(name)) and metrics[name] >= least):
            raise InputError(
                f"`{path}` must have a number as `{name}`, got "
                f"{brief(metrics.get(name))}. {_REMEDY}"
            )
    # Runs of earlier versions have no splits.
    splits = metrics.get("splits", {})
    splits = splits.values() if isinstance(splits, dict) else [splits]
    for found in (metrics.get("eval"), *splits):
        if not isinstance(found, dict) or not all(map(_is_result, found.values())):
            raise InputError(
                f"`{path}` must have metrics as `eval`, got {brief(found)}. {_REMEDY}"
            )
    return metrics


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a `metrics.jsonl`; none if it does not exist.

    Raises:
      InputError: with the line that is not the row of a run.
    """
    # What follows the last line break was cut off when the run was killed.
    lines = _read(path).split(b"\n")[:-1] if path.exists() else []
    return [_row(f"`{path}` line {i}", line) for i, line in enumerate(lines, 1)]


def row_line(row: Row) -> bytes:
    """Returns a row as a line of JSON."""
    return (json.dumps(_plain(row), allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes readable JSON atomically."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    write_text(path, text.encode())


def write_text(path: Path, text: bytes) -> None:
    """Writes a text in UTF-8 atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(text)


def _read(path: Path) -> bytes:
    """Returns the content of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"`{path}` must be a file that can be read: {reason_of(error)}. {_REMEDY}"
        ) from error


def _parse(place: str, text: bytes) -> dict[str, Any]:
    """Returns a JSON object, or raises with its place."""
    try:
        value = json.loads(text.decode(), parse_constant=_refuse)
        reason = f"got {type(value).__name__}"
    # The second is that of JSON nested too deep.
    except (ValueError, RecursionError) as error:
        value, reason = None, f"which it is not: {reason_of(error)}"
    if not isinstance(value, dict):
        raise InputError(f"{place} must be a JSON object, {reason}. {_REMEDY}")
    return value


def _refuse(word: str) -> NoReturn:
    """Raises for NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{word} is not JSON")


def _row(place: str, line: bytes) -> dict[str, Any]:
    """Returns the row of an update, of an evaluation, or of another event."""
    row = _parse(place, line)
    step = row.get("step")
    if type(step) is not int or step < 0:
        raise InputError(
            f"{place} must have a `step`, a whole number, got {brief(step)}. {_REMEDY}"
        )
    if is_evaluation(row):
        if not isinstance(row["split"], str):
            raise InputError(
                f"{place} must have a name as `split`, got {brief(row['split'])}. "
                f"{_REMEDY}"
            )
        numbers = [name for name in row if name not in _OF_EVALUATIONS]
        wrong = [name for name in numbers if not _is_result(row[name])]
    elif updates_of([row]):
        wrong = [name for name in _OF_UPDATES if not _is_number(row.get(name))]
        wrong += [] if _is_result(row["loss"]) else ["loss"]
    else:
        wrong = []
    if wrong:
        raise InputError(
            f"{place} must have a number as `{wrong[0]}`, got "
            f"{brief(row.get(wrong[0]))}. {_REMEDY}"
        )
    return row


def _is_number(value: object) -> bool:
    """Returns whether a value is a number of common size."""
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _is_result(value: object) -> bool:
    """Returns whether a value is a number, or the null that stands for another one."""
    return value is None or _is_number(value)


def _plain(value: object) -> object:
    """Returns a value with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Updates at the beginning and at the end: fewer losses differ by their batches alone.
_LEAST_AVERAGED, _MOST_AVERAGED = 5, 50
_FEW = 3  # updates that show that a loss has exploded
_GUESSING = 0.9  # share of the vocabulary: fewer tokens mean that something was learned


def updates_of(rows: MetricRows) -> list[Row]:
    """Returns the rows of updates, without batches that were skipped.

    Example:
      >>> rows = [{"step": 1, "loss": 2.0}, {"step": 1, "split": "test", "loss": 3.0}]
      >>> updates_of(rows)
      [{'step': 1, 'loss': 2.0}]
    """
    return [row for row in rows if "loss" in row and not is_evaluation(row)]


def evaluations_of(rows: MetricRows) -> list[Row]:
    """Returns the rows of evaluations, one for each split."""
    return [row for row in rows if is_evaluation(row)]


def is_evaluation(row: Row) -> bool:
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
      >>> rows = [{"step": i, "loss": loss} for i, loss in enumerate([1, 2, 3, 3, 2.6])]
      >>> [line.split(":")[0] for line in outcome_warnings(rows, {}, 100)]
      ['the loss ends at 2.6, above 1 where it began']
    """
    # Earlier versions wrote a null for one that is not finite.
    losses = [row["loss"] for row in updates_of(rows) if row["loss"] is not None]
    if rise := _rise(losses):
        yield f"{rise}: the run has not learned, or diverged. Lower `learning_rate`."
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


def _rise(losses: Sequence[float]) -> str | None:
    """Returns that a loss ends above where it began, if that is more than noise.

    Every one of the last losses is above twice the first, or the means of the first and
    of the last differ by more than two standard errors.
    """
    width = min(_MOST_AVERAGED, len(losses) // 3)
    begin, end = losses[:width], losses[-width:]
    # A loss that explodes at once raises the first mean too, but not the first loss.
    last_few = losses[1:][-max(width, _FEW) :]
    if len(last_few) >= _FEW and min(last_few) > 2 * losses[0]:
        return f"the loss ends at {mean(end):.4g}, above {losses[0]:.4g} where it began"
    if width < _LEAST_AVERAGED:
        return None
    error = math.sqrt((variance(begin) + variance(end)) / width)
    if mean(end) - mean(begin) <= 2 * error:
        return None
    return (
        f"the loss ends at {mean(end):.4g}, above {mean(begin):.4g} where it began "
        f"(means of {width} updates)"
    )
