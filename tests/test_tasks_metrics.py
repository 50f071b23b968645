import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.tasks.glue import TASKS
from sparse_jax.tasks.metrics import accuracy, evaluate, f1, matthews, pearson, spearman


def pairs(values):
    return st.lists(st.tuples(values, values), min_size=1, max_size=40).map(
        lambda rows: tuple(np.array(rows).T)
    )


@settings(deadline=None)
@given(pairs(st.integers(0, 1)))
def test_two_classes_agree_with_scikit_learn(rows):
    predictions, labels = rows
    assert accuracy(predictions, labels) == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predictions)
    )
    # scikit-learn warns and returns 0 where neither has a 1.
    if predictions.any() or labels.any():
        expected = sklearn.metrics.f1_score(labels, predictions)
        assert f1(predictions, labels) == pytest.approx(expected)
    else:
        assert f1(predictions, labels) == 0.0


@settings(deadline=None)
@given(pairs(st.integers(0, 3)))
def test_matthews_agrees_with_scikit_learn(rows):
    predictions, labels = rows
    # scikit-learn warns of a single class and returns 0, except where both agree.
    if len(np.union1d(predictions, labels)) > 1:
        expected = sklearn.metrics.matthews_corrcoef(labels, predictions)
        assert matthews(predictions, labels) == pytest.approx(expected, abs=1e-12)
    else:
        assert matthews(predictions, labels) == 0.0


@settings(deadline=None)
@given(pairs(st.integers(-20, 20)))
def test_correlations_agree_with_scipy(rows):
    x, y = rows[0] / 4, rows[1] / 4
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        assert pearson(x, y) == spearman(x, y) == 0.0
    else:
        assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-9)
        expected = scipy.stats.spearmanr(x, y)[0]
        assert spearman(x, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", [pearson, spearman])
@pytest.mark.parametrize(
    "predictions",
    [[0.1] * 7, [0.0] * 7, [np.nan] * 7, [np.inf, *range(6)], [*range(6), np.nan]],
    ids=["constant", "zero", "nan", "inf", "one nan"],
)
def test_a_correlation_without_meaning_is_zero(metric, predictions):
    x, y = np.array(predictions, np.float32), np.arange(7, dtype=np.float32)
    assert metric(x, y) == metric(y, x) == 0.0


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_correlations_do_not_depend_on_the_scale(scale):
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, 5.0])
    assert pearson(scale * x, y) == pytest.approx(pearson(x, y))


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "expected"),
    [
        (accuracy, [1, 1, 0, 0], [1, 0, 0, 0], 0.75),
        (f1, [0, 0], [1, 0], 0.0),
        (f1, [0, 0], [0, 0], 0.0),
        (f1, [1, 1], [1, 1], 1.0),
        (matthews, [1, 1, 1], [1, 0, 1], 0.0),
        (matthews, [1, 0, 1], [1, 1, 1], 0.0),
        (matthews, [1, 0, 1], [0, 1, 0], -1.0),
        (pearson, [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -1.0),
        (spearman, [1.0, 10.0, 100.0], [1.0, 2.0, 3.0], 1.0),
    ],
)
def test_small_cases_are_right(metric, predictions, labels, expected):
    value = metric(np.array(predictions), np.array(labels))
    assert isinstance(value, float)
    assert value == pytest.approx(expected)


def test_matthews_of_many_examples_does_not_overflow():
    labels = np.arange(400_000, dtype=np.int32) % 2
    assert matthews(labels, labels) == pytest.approx(1.0)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_evaluation_gives_the_metrics_of_the_task_primary_first(task):
    outputs = np.eye(2, dtype=np.float32)
    outputs = outputs[:, :1] if task.is_regression else outputs
    labels = outputs[:, 0] if task.is_regression else np.array([0, 1], np.int32)
    metrics = evaluate(task, outputs, labels)
    assert tuple(metrics) == task.metrics
    assert list(metrics.values()) == pytest.approx([1.0] * len(metrics))


def test_values_may_have_one_axis_or_two():
    outputs, labels = np.array([0.5, 2.0, 1.0]), np.array([0.0, 5.0, 3.0])
    task = TASKS["stsb"]
    one, two = (evaluate(task, x, labels) for x in (outputs, outputs[:, None]))
    assert one == two
    assert one["spearman"] == pytest.approx(1.0)
