"""The metrics of GLUE."""

from types import MappingProxyType

import numpy as np
from scipy.stats import rankdata

from sparse_jax.tasks.glue import Task

__all__ = ["METRICS", "accuracy", "evaluate", "f1", "matthews", "pearson", "spearman"]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the fraction of predictions that are right.

    Args:
      predictions: classes, `[N]`.
      labels: classes, `[N]`.
    """
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the F1 score of class 1, 0 if it is never right.

        F1 = 2 TP / (2 TP + FP + FN)

    Args:
      predictions: classes 0 and 1, `[N]`.
      labels: classes 0 and 1, `[N]`.

    Example:
      >>> f1(np.array([1, 1, 0]), np.array([1, 0, 1]))
      0.5
    """
    hits = np.sum((predictions == 1) & (labels == 1))
    claims = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / claims) if claims else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the Matthews correlation of two classes or more, in [-1, 1].

    With c of n examples right, p_k predicted to be of class k, and t_k truly so,

        R = (c n - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)),

    and 0 if all predictions, or all labels, are the same.

    Args:
      predictions: classes, `[N]`.
      labels: classes, `[N]`.

    References:
      Gorodkin, 2004, Comparing two K-category assignments by a K-category correlation
      coefficient, Computational Biology and Chemistry 28.
    """
    classes = np.union1d(predictions, labels)
    predicted = np.array([np.sum(predictions == k) for k in classes], np.float64)
    true = np.array([np.sum(labels == k) for k in classes], np.float64)
    n = float(len(labels))
    spread = (n**2 - predicted @ predicted) * (n**2 - true @ true)
    if spread == 0:
        return 0.0
    right = float(np.sum(predictions == labels))
    return float((right * n - predicted @ true) / np.sqrt(spread))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the linear correlation, in [-1, 1].

    It is 0 where it is not defined: if all predictions or all labels are the same, or
    one of them is not finite.

    Args:
      predictions: values, `[N]`.
      labels: values, `[N]`.
    """
    x, y = _centred(predictions), _centred(labels)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(x @ y / norms, -1, 1)) if norms else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the correlation of the ranks, equal values sharing their mean rank.

    It is 0 where `pearson` is.

    Args:
      predictions: values, `[N]`.
      labels: values, `[N]`.
    """
    if not np.isfinite(predictions).all() or not np.isfinite(labels).all():
        return 0.0
    return pearson(rankdata(predictions), rankdata(labels))


def _centred(values: np.ndarray) -> np.ndarray:
    """Returns values less their mean, or zeros where that means nothing."""
    values = np.asarray(values, np.float64)
    # The mean of equal values is off by rounding, so they are told apart before.
    if not np.isfinite(values).all() or np.all(values == values[0]):
        return np.zeros_like(values)
    # Correlation does not depend on the scale, and squares of scaled values are finite.
    values = values / np.abs(values).max()
    return values - values.mean()


METRICS = MappingProxyType(
    {
        "accuracy": accuracy,
        "f1": f1,
        "matthews": matthews,
        "pearson": pearson,
        "spearman": spearman,
    }
)


def evaluate(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the metrics of a task, the primary one first.

    Args:
      task: names the metrics.
      outputs: logits `[N, C]`, or values `[N]` or `[N, 1]` for regression.
      labels: `[N]`, classes or values.

    Example:
      >>> from sparse_jax.tasks.glue import TASKS
      >>> evaluate(TASKS["rte"], np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
      {'accuracy': 0.5}
    """
    outputs = np.asarray(outputs)
    predictions = outputs.ravel() if task.is_regression else outputs.argmax(axis=-1)
    return {name: METRICS[name](predictions, labels) for name in task.metrics}
