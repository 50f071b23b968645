import pytest

from sparse_jax.data.glue import TASKS, find_task
from sparse_jax.data.metrics import METRICS
from sparse_jax.errors import InputError


@pytest.mark.parametrize(
    ("name", "primary", "num_outputs"),
    [
        ("cola", "matthews", 2),
        ("sst2", "accuracy", 2),
        ("mrpc", "accuracy", 2),
        ("stsb", "pearson", 1),
        ("qqp", "accuracy", 2),
        ("mnli", "accuracy", 3),
        ("qnli", "accuracy", 2),
        ("rte", "accuracy", 2),
    ],
)
def test_glue_has_eight_tasks(name, primary, num_outputs):
    assert TASKS[name].primary == primary
    assert TASKS[name].num_outputs == num_outputs
    assert TASKS[name].is_regression == (name == "stsb")


def test_three_other_tasks_are_for_labels_of_ones_own():
    assert [*TASKS][8:] == ["multilabel", "regression", "classification"]
    assert TASKS["classification"].labels is TASKS["multilabel"].labels is None
    assert [task.name for task in TASKS.values() if task.is_multilabel] == [
        "multilabel"
    ]
    assert not TASKS["classification"].is_regression
    assert TASKS["regression"].is_regression


@pytest.mark.parametrize("name", ["SST-2", "sst2", "Sst2", "sst_2"])
def test_case_and_hyphens_do_not_matter(name):
    assert find_task(name) is TASKS["sst2"]


def test_an_unknown_task_lists_the_known_ones():
    message = "`task` must be one of cola, sst2, .*classification, causal, got 'wnli'."
    with pytest.raises(InputError, match=message):
        find_task("wnli")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_every_metric_of_a_task_exists(task):
    assert set(task.metrics) <= set(METRICS)


def test_only_mnli_has_a_mismatched_split():
    names = [t.name for t in TASKS.values() if "validation_mismatched" in t.evaluation]
    assert names == ["mnli"]
