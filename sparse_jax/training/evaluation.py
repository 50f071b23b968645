"""Evaluation: the metrics of a model on the splits of a task."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_jax.tasks.glue import Task
from sparse_jax.tasks.metrics import evaluate
from sparse_jax.training.feed import Feed
from sparse_jax.training.loss import Predict

__all__ = ["evaluate_splits", "flattened"]

Metrics = dict[str, float]


def evaluate_splits(
    task: Task, feed: Feed, predict: Predict, params: Any, trained: Any
) -> dict[str, Metrics]:
    """Returns the metrics of every evaluation split, by the split's name.

    Args:
      task: says what is measured.
      feed: the batches.
      predict: compiled logits, as `make_predict` returns them.
      params: parameters of the model.
      trained: arrays of the attachment.
    """
    results = {}
    for split, batches in feed.evaluation.items():
        outputs = [
            np.asarray(predict(params, trained, batch))[batch["weights"] == 1]
            for batch in batches
        ]
        labels = feed.encoded[split].labels
        results[split] = evaluate(task, np.concatenate(outputs), labels)
    return results


def flattened(results: Mapping[str, Metrics]) -> Metrics:
    """Returns metrics under one name each: those of later splits bear the split's.

    Example:
      >>> flattened({"validation": {"f1": 0.5}, "test": {"f1": 0.25}})
      {'f1': 0.5, 'f1_test': 0.25}
    """
    first = next(iter(results))
    return {
        name if split == first else f"{name}_{split}": value
        for split, metrics in results.items()
        for name, value in metrics.items()
    }
