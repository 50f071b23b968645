"""The first gradient of a new head is about the offset of all examples alike."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sharding import ONE_LEAF, random_batch, supports_of, tuner_of
from tiny_run import tiny_settings, write_files

from sparse_jax import Compact, InputError, Sparse, finetune, sift
from sparse_jax.compact.selection import measure
from sparse_jax.sharding.mesh import MeshShape, make_mesh, mesh_of
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner
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


# y = 5 + 2 x_8 + noise: features 0 to 7 are always 1, and say the offset.
WIDTH, K = 16, 8
KEY = jax.random.key(0)


def planted(seed):
    random = np.random.default_rng(seed)
    x = random.normal(size=(256, WIDTH)).astype(np.float32)
    x[:, :8] = 1.0
    return x, 5 + 2 * x[:, 8]


def planted_params():
    kernel = jnp.asarray([0.3, -0.2, 0.4, 0.5, -0.3, 0.2, 0.6, -0.4])
    return {
        "map": jnp.zeros((WIDTH, K)),
        "head": {"kernel": kernel, "bias": 0.0 * kernel[:1]},
    }


def planted_loss(params, batch, key, attachment):
    x, y = batch
    outputs = x @ params["map"] @ params["head"]["kernel"] + params["head"]["bias"]
    return jnp.sum((outputs - y) ** 2), len(y)


METHOD = Sparse(density=1 / WIDTH, where="map", dense="head/bias", stack=None)


def rows_chosen(support):
    """Returns the features whose entries are chosen."""
    return {*(np.asarray(support["map"]) // K).tolist()}


def gradient(params, batch):
    return jax.grad(lambda params: planted_loss(params, batch, None, None)[0] / 256)(
        params
    )


def test_both_tiers_choose_by_the_same_sum_over_batches():
    batches = [planted(seed) for seed in range(3)]
    tuner, params = Compact(planted_loss, METHOD, optax.sgd(0.1)), planted_params()
    state, total = tuner.init(params, KEY), None
    for batch in batches:
        total = measure(tuner, state, batch, KEY, total)
    state, finite = tuner.select(state, None, KEY, statistic=total)
    tx = sift(optax.sgd(0.1), 1 / WIDTH, where="map", dense="head/bias", select_from=3)
    other = tx.init(params)
    for batch in batches:
        _, other = tx.update(gradient(params, batch), other, params)
    assert finite
    np.testing.assert_array_equal(state.support["map"], other.support["map"])
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, total)
    assert not tuner.select(state, None, KEY, statistic=bad)[1]


def test_a_mesh_chooses_by_the_same_sum_over_batches():
    found = []
    for mesh in (mesh_of(None), make_mesh(MeshShape(data=2, fsdp=4))):
        tuner, params = tuner_of(ONE_LEAF)
        placement = Placement.of(params, mesh)
        tuner, _ = tuner_of(ONE_LEAF, placement)
        runner = MeshRunner(tuner, placement)
        state = runner.init(jax.device_put(params, placement.params), KEY)
        batch = placement.put(random_batch())
        flipped = {**batch, "input_ids": batch["input_ids"][:, ::-1]}
        state, finite = runner.select(state, batch, KEY, None, [(flipped, KEY)])
        assert finite
        found.append(supports_of(state))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_run_chooses_by_several_batches_and_trains_on_the_same_ones(files, tmp_path):
    options = {"where": ("query",), "max_steps": 2}
    runs = [
        tiny_settings(**files, output=tmp_path / str(n), select_batches=n, **options)
        for n in (1, 3)
    ]
    for run in runs:
        finetune(run)
    rows = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in "13"]
    first = [
        [json.loads(row)["loss"] for row in lines if "loss" in row][0] for lines in rows
    ]
    assert first[0] == first[1]


def test_several_batches_choose_nothing_without_a_gradient(files, tmp_path):
    with pytest.raises(InputError, match="`select_batches` must be left out where no"):
        make_job(
            tiny_settings(**files, output=tmp_path, method="random", select_batches=2)
        )
