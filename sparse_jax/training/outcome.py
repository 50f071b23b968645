"""What is wrong with a run that came to its end."""

import math
from collections.abc import Iterator, Mapping
from statistics import mean

import numpy as np

from sparse_jax.adapter_file import Adapter
from sparse_jax.errors import InputError
from sparse_jax.training.history import Rows, skipped_at_end, updates_of

__all__ = ["outcome_warnings", "require_finite"]

_MOST_AVERAGED = 50  # updates at the beginning and at the end
_GUESSING = 0.9  # share of the vocabulary: fewer tokens are something learnt


def outcome_warnings(
    rows: Rows, results: Mapping[str, Mapping[str, float]], vocab_size: int
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
    losses = [row["loss"] for row in updates_of(rows)]
    width = min(_MOST_AVERAGED, max(1, len(losses) // 3))
    first, last = mean(losses[:width]), mean(losses[-width:])
    if last > first:
        averaged = f" (means of {width} updates)" if width > 1 else ""
        yield (
            f"the loss ends at {last:.4g}, above {first:.4g} where it began{averaged}: "
            "the run has not learned, or diverged. Lower --learning-rate."
        )
    if in_a_row := skipped_at_end(rows):
        yield f"the last {in_a_row} batches were skipped: their loss is not finite."
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


def require_finite(adapter: Adapter) -> None:
    """Raises if training left a value that is not finite.

    Raises:
      InputError: naming the leaf.
    """
    added = {
        f"{site}/{part}": array
        for site, parts in adapter.added.items()
        for part, array in parts.items()
    }
    for name, array in {**adapter.values, **adapter.dense, **added}.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"`{name}` must be finite after training, and is not. Lower "
                "--learning-rate, or pass --dtype float32. No adapter is written."
            )
