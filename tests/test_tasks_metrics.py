from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.data.glue import TASKS
from sparse_jax.data.metrics import (
    accuracy,
    evaluate,
    f1,
    is_greater_better,
    macro_f1,
    majority_baseline,
    matthews,
    micro_f1,
    one_class_warning,
    pearson,
    report,
    rmse,
    spearman,
    subset_accuracy,
)


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
    labels = outputs if task.is_multilabel else labels
    metrics = evaluate(task, outputs, labels)
    assert tuple(metrics) == (*task.metrics, "loss")
    del metrics["loss"]
    best = [1.0 if is_greater_better(name) else 0.0 for name in metrics]
    assert list(metrics.values()) == pytest.approx(best)


def test_values_may_have_one_axis_or_two():
    outputs, labels = np.array([0.5, 2.0, 1.0]), np.array([0.0, 5.0, 3.0])
    task = TASKS["stsb"]
    one, two = (evaluate(task, x, labels) for x in (outputs, outputs[:, None]))
    assert one == two
    assert one["spearman"] == pytest.approx(1.0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1))
def test_sets_of_labels_agree_with_scikit_learn(rows):
    predictions, labels = np.array(rows)[:, :3], np.array(rows)[:, 3:]
    assert subset_accuracy(predictions, labels) == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predictions)
    )
    if predictions.any() or labels.any():
        for average, metric in (("micro", micro_f1), ("macro", macro_f1)):
            options = {"average": average, "zero_division": 0.0}
            expected = sklearn.metrics.f1_score(labels, predictions, **options)
            assert metric(predictions, labels) == pytest.approx(expected)
    else:
        assert micro_f1(predictions, labels) == 0.0


def test_the_root_of_the_squared_error_is_that_of_a_mean():
    assert rmse(np.array([1.0, 2.0]), np.array([0.0, 4.0])) == 2.5**0.5


@settings(deadline=None, max_examples=30)
@given(pairs(st.integers(0, 3)))
def test_the_report_of_classes_agrees_with_scikit_learn(rows):
    predictions, labels = rows
    task = replace(TASKS["classification"], labels=tuple("abcd"))
    outputs = np.eye(4)[predictions]
    options: Any = {"labels": range(4), "zero_division": 0.0}
    expected: Any = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, **options
    )
    found: Any = report(task, outputs, labels)
    scores = [[*one.values()] for one in found["classes"].values()]
    np.testing.assert_allclose(np.transpose(scores), expected)
    matrix = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(4))
    assert found["confusion_matrix"] == matrix.tolist()
    metrics = evaluate(task, outputs, labels)
    both = {"y_true": labels, "y_pred": predictions, "average": "macro"}
    assert metrics["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(**both))
    shares = np.exp(outputs) / np.exp(outputs).sum(axis=-1, keepdims=True)
    loss = sklearn.metrics.log_loss(labels, shares, labels=range(4))
    assert metrics["loss"] == pytest.approx(loss)


def test_reports_have_what_is_known_without_a_model():
    task = replace(TASKS["multilabel"], labels=("a", "b"))
    outputs, labels = np.array([[1.0, -1.0]] * 3), np.array([[1, 0], [1, 0], [0, 1]])
    found: Any = report(task, outputs, labels)
    baseline = {"labels": ["a"], "subset_accuracy": pytest.approx(2 / 3)}
    assert found["majority_baseline"] == baseline
    assert found["classes"]["b"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    found = report(TASKS["regression"], np.array([0.0, 0.0]), np.array([1.0, 3.0]))
    assert found == {"mean_baseline": {"value": 2.0, "rmse": 1.0}}


@pytest.mark.parametrize("name", ["mrpc", "stsb"])
def test_outputs_that_are_not_finite_have_no_metrics(name):
    outputs = np.array([[1.0, 2.0], [np.nan, 1.0]])[:, : TASKS[name].num_outputs]
    metrics = evaluate(TASKS[name], outputs, np.array([1, 0]))
    assert tuple(metrics) == (*TASKS[name].metrics, "loss")
    assert np.isnan(list(metrics.values())).all()


def test_f1_is_about_the_same_class_in_any_order():
    outputs = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = np.array([1, 1, 0, 0])
    turned = replace(TASKS["mrpc"], labels=("equivalent", "not_equivalent"))
    found = evaluate(TASKS["mrpc"], outputs, labels)
    assert found | {"loss": 0} == pytest.approx(
        {"accuracy": 0.75, "f1": 0.8, "loss": 0}
    )
    expected = found
    found = evaluate(turned, outputs[:, ::-1], 1 - labels)
    assert found == pytest.approx(expected)


def test_the_most_frequent_answer_is_the_baseline():
    label, share = majority_baseline(np.array([1, 2, 2, 0]))
    assert (label, share) == (2, 0.5)
    sets, share = majority_baseline(np.array([[1, 0], [1, 0], [1, 1]]))
    assert sets.tolist() == [1, 0]
    assert share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "words"),
    [
        (TASKS["sst2"], [[1, 0]] * 4, [0, 1, 1, 1], ("'negative'", "'positive', the ")),
        (TASKS["sst2"], [[1, 0]] * 4, [0, 1, 1, 1], ("all 4 ", "right for 0.7500 of")),
        (TASKS["stsb"], [[0.5]] * 4, [1, 2, 3, 4], ("all 4 predictions are 0.5",)),
        (
            replace(TASKS["sst2"], labels=("a", "b"), is_multilabel=True),
            [[-1, -1]] * 3,
            [[1, 1], [1, 1], [0, 0]],
            (
                "are without a label",
                "predicting a, b, the most frequent answer, is right for 0.6667",
            ),
        ),
        (TASKS["sst2"], [[1, 0], [0, 1]], [0, 0], ()),
        (TASKS["sst2"], [[1, 0]], [0], ()),
        (TASKS["sst2"], [[np.nan, 0]] * 3, [0, 1, 0], ()),
        (TASKS["stsb"], [[0.5], [0.6]], [1, 1], ()),
    ],
)
def test_one_answer_to_everything_is_told(task, outputs, labels, words):
    warning = one_class_warning(task, np.array(outputs, float), np.array(labels))
    assert (warning is not None) == bool(words)
    assert all(word in (warning or "") for word in words)
