"""The first gradient of a new head is about the offset of all examples alike."""

import numpy as np
import pytest
from tiny_run import tiny_settings, write_files

from sparse_jax.training.build import make_job
from sparse_jax.training.objective import head_bias


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize(
    ("labels", "size", "outputs", "predicted"),
    [
        ([1.0, 2.0, 6.0], 1, np.asarray, [3.0]),
        ([0] * 8 + [1] * 2, 2, softmax, [9 / 12, 3 / 12]),
        ([0, 0, 2], 3, softmax, [3 / 6, 1 / 6, 2 / 6]),
        ([[1.0, 0.0], [1.0, 0.0]], 2, lambda x: 1 / (1 + np.exp(-x)), [3 / 4, 1 / 4]),
    ],
    ids=["mean", "classes", "a class without examples", "any number of labels"],
)
def test_a_head_without_a_kernel_predicts_what_the_labels_say(
    labels, size, outputs, predicted
):
    bias = head_bias(np.array(labels), size)
    np.testing.assert_allclose(outputs(bias), predicted, rtol=1e-12)


def test_equal_classes_leave_the_bias_at_zero():
    assert not head_bias(np.array([0, 1, 2] * 5), 3).any()


@pytest.mark.parametrize("word", ["labels", "zeros"])
def test_a_new_head_starts_as_the_settings_say(files, tmp_path, word):
    job = make_job(tiny_settings(**files, output=tmp_path, head_bias=word))
    labels = job.feed.examples["train"].labels
    expected = head_bias(labels, 2) * (word == "labels")
    np.testing.assert_allclose(job.base.params["classifier"]["bias"], expected, 1e-6)
    assert expected.any() == (word == "labels")
