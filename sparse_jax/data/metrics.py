"""The metrics of GLUE, and of one's own labels.

A metric takes predictions and labels of one shape: classes `[N]`, values `[N]` of a
regression, or 0 or 1 for every label `[N, C]`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, SupportsFloat

import numpy as np

from sparse_jax.data.glue import Task
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.params.fields import Json

__all__ = [
    "METRICS",
    "Metric",
    "accuracy",
    "evaluate",
    "f1",
    "is_greater_better",
    "macro_f1",
    "majority_baseline",
    "matthews",
    "micro_f1",
    "one_class_warning",
    "pearson",
    "predicted",
    "report",
    "require_metrics",
    "rmse",
    "spearman",
    "subset_accuracy",
]

# Words of names.
_LESS_IS_BETTER = {"loss", "perplexity", "error", "mae", "mse", "rmse", "kl"}
# (labels, predictions) -> a number
Metric = Callable[[np.ndarray, np.ndarray], SupportsFloat]
# A confusion matrix of more is no longer read.
_MOST_CLASSES = 100


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the fraction of classes that are right."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the F1 score of class 1 of two classes, 0 if it is never right.

        F1 = 2 TP / (2 TP + FP + FN)

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
    """Returns the linear correlation of values, in [-1, 1].

    It is 0 where it is not defined: if all predictions or all labels are the same, or
    one of them is not finite.
    """
    x, y = _centred(predictions), _centred(labels)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(x @ y / norms, -1, 1)) if norms else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the correlation of ranks of values, equal ones sharing their mean rank.

    It is 0 where `pearson` is.
    """
    if not np.isfinite(predictions).all() or not np.isfinite(labels).all():
        return 0.0
    from scipy.stats import rankdata  # half of the time of importing this library

    return pearson(rankdata(predictions), rankdata(labels))


def rmse(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the root of the mean squared error of values."""
    errors = np.asarray(predictions, np.float64) - np.asarray(labels, np.float64)
    return float(np.sqrt(np.mean(errors**2)))


def subset_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the fraction of examples whose sets of labels `[N, C]` are right."""
    return float(np.mean(np.all(predictions == labels, axis=-1)))


def micro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the F1 score of all labels `[N, C]` of all examples together."""
    return f1(np.ravel(predictions), np.ravel(labels))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of the F1 scores of the labels.

    Of classes, those that no example has and that are never predicted are left out.

    Example:
      >>> macro_f1(np.array([0, 2, 2]), np.array([0, 2, 0]))
      0.6666666666666666
    """
    if np.ndim(labels) == 1:
        kinds = np.union1d(predictions, labels)
        predictions, labels = (np.equal.outer(x, kinds) for x in (predictions, labels))
    return float(np.mean(_scores(predictions, labels).f1))


class _Scores(NamedTuple):
    """Scores of every label, shape=(C,); 0 where they are not defined."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray  # examples that have the label


def _scores(predictions: np.ndarray, labels: np.ndarray) -> _Scores:
    """Returns the scores of labels that are predicted or not, and fit or not."""
    claimed, true = np.asarray(predictions, bool), np.asarray(labels, bool)
    hits, claims, support = (x.sum(axis=0) for x in (claimed & true, claimed, true))
    share = lambda part, whole: part / np.maximum(whole, 1)
    of_both = share(2 * hits, claims + support)
    return _Scores(share(hits, claims), share(hits, support), of_both, support)


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
        "macro_f1": macro_f1,
        "matthews": matthews,
        "micro_f1": micro_f1,
        "pearson": pearson,
        "rmse": rmse,
        "spearman": spearman,
        "subset_accuracy": subset_accuracy,
    }
)


def is_greater_better(name: str) -> bool:
    """Returns whether a model with a greater value of a metric is a better one.

    Example:
      >>> is_greater_better("accuracy"), is_greater_better("mean_absolute_error")
      (True, False)
    """
    return not _LESS_IS_BETTER & {*name.split("_")}


def require_metrics(own: Mapping[str, Metric], task: str, known: Sequence[str]) -> None:
    """Raises `InputError` unless metrics of a program can be those of a task.

    Args:
      own: functions of labels and predictions by name.
      task: of the run.
      known: metrics that it has anyway; none if it has no predictions.
    """
    for name, metric in own.items():
        if not known:
            raise InputError(
                f"`metrics` must be left out with task {task!r}, got {listed(own)}. "
                "They compare predictions with labels."
            )
        is_name = isinstance(name, str) and re.fullmatch("[a-z0-9_]+", name)
        if not is_name or name in known or not callable(metric):
            raise InputError(
                "`metrics` must be functions by names of lower-case letters, digits "
                f"and `_`, other than {listed(known)}, got {brief(name)}: "
                f"{brief(metric)}."
            )


def evaluate(
    task: Task,
    outputs: np.ndarray,
    labels: np.ndarray,
    own: Mapping[str, Metric] = MappingProxyType({}),
) -> dict[str, float]:
    """Returns the metrics of a task, the primary one first, and last the mean loss.

    They are NaN if an output is not finite.

    Args:
      task: names the metrics, and the class that F1 is about.
      outputs: logits `[N, C]`, or values `[N]` or `[N, 1]` for regression.
      labels: `[N]`, classes or values; `[N, C]`, 0 or 1, if any number of labels fit.
      own: other metrics.

    Raises:
      InputError: if one of the other metrics is not a number.

    Example:
      >>> from sparse_jax.data.glue import TASKS
      >>> evaluate(TASKS["rte"], np.array([[2.0, 1.0], [2.0, 2.0]]), np.array([0, 1]))
      {'accuracy': 0.5, 'loss': 0.5032044340390841}
    """
    outputs = np.asarray(outputs)
    if not np.isfinite(outputs).all():
        return dict.fromkeys((*task.metrics, "loss", *own), math.nan)
    loss, predictions = _mean_loss(task, outputs, labels), predicted(task, outputs)
    more = {
        name: _number(name, metric(labels, predictions)) for name, metric in own.items()
    }
    if task.positive is not None and task.labels:
        positive = task.labels.index(task.positive)
        predictions, labels = predictions == positive, labels == positive
    found = {name: METRICS[name](predictions, labels) for name in task.metrics}
    return {**found, "loss": loss, **more}


def _number(name: str, value: SupportsFloat) -> float:
    """Returns what a metric of a program says."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`metrics` must return a number, got {brief(value)} of {brief(name)}."
        ) from error


def _mean_loss(task: Task, outputs: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of what training minimizes, in float64."""
    outputs = np.asarray(outputs, np.float64)
    if task.is_regression:
        return float(np.mean((outputs.ravel() - labels) ** 2))
    if task.is_multilabel:
        return float(np.mean(np.logaddexp(0.0, outputs) - labels * outputs))
    from scipy.special import log_softmax  # half of the time of importing this library

    logs = log_softmax(outputs, axis=-1)
    return float(-np.mean(logs[np.arange(len(labels)), labels]))


def report(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Json]:
    """Returns what a table of results says beside the metrics.

    - `classes`: of every label `precision`, `recall`, `f1` and `support`, the number
      of examples that have it.
    - `confusion_matrix`, of at most 100 classes: examples of each (row) that are
      predicted to be of each (column), in the order of `classes`.
    - `majority_baseline`: the most frequent label or set of labels, and the accuracy of
      always predicting it; of values `mean_baseline`: their mean, and its RMSE.

    Args:
      task: names the labels.
      outputs: as of `evaluate`.
      labels: as of `evaluate`.

    Example:
      >>> from sparse_jax.data.glue import TASKS
      >>> outputs, labels = np.array([[1.0, 0.0]] * 3), np.array([0, 1, 1])
      >>> found = report(TASKS["sst2"], outputs, labels)
      >>> found["confusion_matrix"], found["classes"]["negative"]["recall"]
      ([[1, 0], [2, 0]], 1.0)
      >>> found["majority_baseline"]
      {'label': 'positive', 'accuracy': 0.6666666666666666}
    """
    if task.is_regression:
        values = np.asarray(labels, np.float64)
        mean, error = float(np.mean(values)), float(np.std(values))
        return {"mean_baseline": {"value": mean, "rmse": error}}
    names, size = task.labels or (), len(task.labels or ())
    predictions, (usual, share) = predicted(task, outputs), majority_baseline(labels)
    if task.is_multilabel:
        words: list[Json] = [
            name for name, has in zip(names, usual, strict=True) if has
        ]
        baseline: dict[str, Json] = {"labels": words, "subset_accuracy": share}
        claimed, true = predictions, labels
    else:
        baseline = {"label": names[int(usual)], "accuracy": share}
        claimed, true = (np.equal.outer(x, range(size)) for x in (predictions, labels))
    found: dict[str, Json] = {"majority_baseline": baseline}
    columns = [column.tolist() for column in _scores(claimed, true)]
    found["classes"] = {
        name: dict(zip(_Scores._fields, scores, strict=True))
        for name, *scores in zip(names, *columns, strict=True)
    }
    if not task.is_multilabel and size <= _MOST_CLASSES:
        pairs = np.bincount(size * labels + predictions, minlength=size**2)
        found["confusion_matrix"] = pairs.reshape(size, size).tolist()
    return found


def predicted(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Returns values `[N]`, classes `[N]`, or whether every label fits `[N, C]`."""
    if task.is_regression:
        return outputs.ravel()
    # The sigmoid of a logit is above one half exactly if the logit is positive.
    return (outputs > 0) if task.is_multilabel else outputs.argmax(axis=-1)


def majority_baseline(labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the most frequent label, or set of labels, and the fraction that has it.

    That fraction is the accuracy of a model that always gives the same answer.

    Args:
      labels: classes `[N]`, or 0 or 1 for every label `[N, C]`.

    Example:
      >>> majority_baseline(np.array([2, 0, 2, 2]))
      (array(2), 0.75)
    """
    kinds, counts = np.unique(labels, axis=0, return_counts=True)
    return np.asarray(kinds[counts.argmax()]), float(counts.max() / len(labels))


def one_class_warning(
    task: Task, outputs: np.ndarray, labels: np.ndarray
) -> str | None:
    """Returns a line if a model gives every example the same answer, None otherwise.

    Args:
      task: names the labels.
      outputs: as of `evaluate`.
      labels: as of `evaluate`.

    Example:
      >>> from sparse_jax.data.glue import TASKS
      >>> outputs, labels = np.array([[2.0, 1.0]] * 3), np.array([0, 1, 0])
      >>> one_class_warning(TASKS["rte"], outputs, labels)[:52]
      "all 3 predictions are 'entailment'. Always predictin"
    """
    outputs = np.asarray(outputs)
    predictions = predicted(task, outputs)
    is_varied = np.any(predictions != predictions[0])
    if is_varied or len(predictions) < 2 or not np.isfinite(outputs).all():
        return None
    if task.is_regression:
        return (
            f"all {len(labels)} predictions are {predictions[0]:.4g}: a correlation is "
            "not defined, and reported as 0."
        )
    answer, (usual, share) = predictions[0], majority_baseline(labels)
    return (
        f"all {len(labels)} predictions are {_answer(task, answer)}. Always predicting "
        f"{_answer(task, usual)}, the most frequent answer, is right for {share:.4f} "
        "of the examples."
    )


def _answer(task: Task, label: np.ndarray) -> str:
    """Returns the name of a class, or those of a set of labels."""
    names = task.labels or ()
    if not task.is_multilabel:
        return brief(names[int(label)]) if names else str(label)
    found = [name for name, has in zip(names, label, strict=True) if has]
    return listed(found) or "without a label"
