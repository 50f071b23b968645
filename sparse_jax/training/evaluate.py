"""Evaluation of a saved adapter."""

from pathlib import Path
from typing import Any

from sparse_jax.adapter_file import Adapter, load_adapter
from sparse_jax.adapter_use import apply_adapter
from sparse_jax.errors import InputError
from sparse_jax.tasks.examples import Splits
from sparse_jax.tasks.files import load
from sparse_jax.tasks.glue import find_task
from sparse_jax.tasks.tokens import load_tokenizer
from sparse_jax.training.evaluation import evaluate_splits, flattened
from sparse_jax.training.feed import make_feed
from sparse_jax.training.job import load_base
from sparse_jax.training.loss import make_predict

__all__ = ["evaluate_adapter"]

# For adapters that no run has written.
_DEFAULTS = {"dtype": "float32", "seed": 0, "max_length": None, "batch_size": 32}


def evaluate_adapter(
    adapter: str | Path,
    *,
    model: str | None = None,
    task: str | None = None,
    data: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
) -> dict[str, float]:
    """Returns the metrics of an adapter, those that its run reported.

    Args:
      adapter: adapter file or run directory.
      model: the base, folder or id; None is where the adapter was trained.
      task: None is the task of the adapter.
      data: folder of the task's files; None asks the Hub.
      batch_size: examples at a time; None is as in training.
      max_length: most tokens of an example; None is as in training.

    Raises:
      InputError: if the adapter cannot be read, the base is another one, or the data
        are wrong or have other labels.
    """
    found = load_adapter(adapter)
    splits = load(find_task(task or found.task), data)
    _require_labels(found, splits)
    trained_with = {**_DEFAULTS, **found.settings}
    base = load_base(
        model or found.base_model,
        splits.task,
        trained_with["dtype"],
        trained_with["seed"],
    )
    params, attachment = apply_adapter(base.params, found, base_hash=base.hash)
    feed = make_feed(
        splits,
        load_tokenizer(base.folder),
        base.model,
        max_length=max_length or trained_with["max_length"],
        batch_size=batch_size or trained_with["batch_size"],
    )
    predict = make_predict(base.model, attachment)
    results = evaluate_splits(splits.task, feed, predict, params, attachment.trained)
    return flattened(results)


def _require_labels(adapter: Adapter, splits: Splits) -> None:
    """Raises unless the data have the labels that the adapter was trained on."""
    labels: Any = splits.task.labels or ()
    if tuple(labels) != adapter.labels:
        raise InputError(
            f"`data` must have the labels of the adapter, "
            f"{', '.join(adapter.labels) or 'numbers'}, got "
            f"{', '.join(labels) or 'numbers'}. Pass the task it was trained on."
        )
