"""The first gradient of a new head is about the offset of all examples alike."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sharding import ONE_LEAF, random_batch, supports_of, tuner_of
from tiny_run import tiny_settings, write_files

from sparse_jax import (
    Compact,
    InputError,
    Sparse,
    evaluate_adapter,
    finetune,
    sift,
)
from sparse_jax.compact.selection import before_selection
from sparse_jax.sharding.mesh import MeshShape, make_mesh, mesh_of
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.training.build import make_job
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.objective import head_bias
from sparse_jax.training.run_files import read_rows, updates_of


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


WITHOUT_HEAD = Sparse(density=0.1, where="query", dense=())
METHOD = Sparse(density=1 / WIDTH, where="map", dense="head/bias", stack=None)


def rows_chosen(support):
    """Returns the features whose entries are chosen."""
    return {*(np.asarray(support["map"]) // K).tolist()}


@jax.jit
def gradient(params, batch):
    mean = lambda params: planted_loss(params, batch, None, None)[0] / 256
    return jax.grad(mean)(params)


@pytest.mark.parametrize("score", ["gradient", "normalized", "smallest-fisher"])
def test_both_tiers_choose_by_the_same_sum_over_batches(score):
    batches = [planted(seed) for seed in range(3)]
    method, params = replace(METHOD, score=score), planted_params()
    tuner = Compact(planted_loss, method, optax.sgd(0.1))
    state = tuner.init(params, KEY)
    select = jax.jit(tuner.select)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    keys = jax.random.split(KEY, 3)
    chosen, finite = select(state, stacked, keys)
    rules = {"where": "map", "dense": "head/bias", "score": score}
    tx = sift(optax.sgd(0.1), 1 / WIDTH, **rules, select_batches=3)
    other, update = tx.init(params), jax.jit(tx.update)
    for batch in batches:
        _, other = update(gradient(params, batch), other, params)
    assert finite
    np.testing.assert_array_equal(chosen.support["map"], other.support["map"])
    x, y = stacked
    assert not select(state, (x.at[1].set(jnp.nan), y), keys)[1]


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_entries_that_matter_are_chosen_once_the_head_knows_the_offset(dtype):
    """Both tiers make the same updates before the selection and after it."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.2))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), planted_params())
    tuner = Compact(planted_loss, METHOD, tx)
    state = tuner.init(params, KEY)
    select = jax.jit(tuner.select)
    at_once, _ = select(state, planted(0), KEY)
    assert rows_chosen(at_once.support) <= {*range(8)}

    first = before_selection(tuner)
    state, step = first.init(params, KEY), jax.jit(first.step)
    for _ in range(40):
        state, _ = step(state, planted(0), KEY)
    np.testing.assert_array_equal(state.params["map"], params["map"])
    state, _ = select(tuner.init(state.params, KEY), planted(0), KEY)
    assert rows_chosen(state.support) == {8}
    step = jax.jit(tuner.step)
    for _ in range(5):
        state, _ = step(state, planted(0), KEY)

    one = sift(tx, 1 / WIDTH, where="map", dense="head/bias", select_after=40)
    other, update = one.init(params), jax.jit(one.update)
    types = jax.tree.map(jax.typeof, other)
    for _ in range(45):
        updates, other = update(gradient(params, planted(0)), other, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.map(jax.typeof, other) == types
    np.testing.assert_array_equal(state.support["map"], other.support["map"])
    close = lambda a, b: np.testing.assert_allclose(
        np.float32(a), np.float32(b), rtol=1e-5 if dtype == "float32" else 1e-2
    )
    jax.tree.map(close, state.params, params)


def test_nothing_dense_leaves_nothing_to_train_before_the_selection():
    tx = sift(optax.sgd(0.1), 0.5, select_after=3)
    with pytest.raises(InputError, match="`select_after` must be 0 without leaves in"):
        tx.init(planted_params())


@pytest.mark.slow
def test_a_mesh_makes_the_same_updates_before_the_selection():
    method, found = replace(ONE_LEAF, dense="norm"), []
    for mesh in (mesh_of(None), make_mesh(MeshShape(data=2, fsdp=4))):
        placement = Placement.of(tuner_of(method)[1], mesh)
        tuner, params = tuner_of(method, placement)
        runner = MeshRunner(tuner, placement)
        first = MeshRunner(before_selection(tuner), placement)
        batch = placement.put(random_batch())
        state = first.init(jax.device_put(params, placement.params), KEY)
        for _ in range(2):
            state, _ = first.step(state, batch, KEY)
        state, _ = runner.select(runner.take_over(state, KEY), batch, KEY)
        state, metrics = runner.step(state, batch, KEY)
        found.append((supports_of(state), float(metrics["loss"])))
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_chooses_by_the_batches_that_it_trains_on_next(
    accumulate, files, tmp_path, monkeypatch
):
    def noted(found, run):
        def call(runner, state, batch, key, *args, **options):
            found.append((jax.device_get(batch), key))
            return run(runner, state, batch, key, *args, **options)

        return call

    chosen, trained = [], []
    monkeypatch.setattr(MeshRunner, "select", noted(chosen, MeshRunner.select))
    monkeypatch.setattr(MeshRunner, "step", noted(trained, MeshRunner.step))
    options = {"where": ("query",), "max_steps": 3, "select_batches": 3}
    finetune(
        tiny_settings(
            **files, output=tmp_path / "run", accumulate=accumulate, **options
        )
    )
    ((batches, keys),) = chosen
    for number, (batch, key) in enumerate(trained):
        if accumulate > 1:  # the first micro-batch of each
            batch = {name: array[0] for name, array in batch.items()}
            key = jax.random.split(key, accumulate)[0]
        assert keys[number] == key
        for name, array in batch.items():
            own, room = np.split(batches[name][number], array.shape[-1:], axis=-1)
            np.testing.assert_array_equal(own, array)
            assert not room.any()


def test_several_batches_choose_nothing_without_a_gradient(files, tmp_path):
    with pytest.raises(InputError, match="`select_batches` must be left out where no"):
        make_job(
            tiny_settings(**files, output=tmp_path, method="random", select_batches=2)
        )


@pytest.mark.parametrize("sampler", [None, pytest.param("ist", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_stopped_before_its_selection_ends_like_one_that_was_not(
    files, tmp_path, monkeypatch, sampler
):
    options = {"where": ("query",), "epochs": 2, "select_after": 3, "save_every": 2}
    options |= {"sampler": sampler, "dtype": "bfloat16"}
    whole = finetune(tiny_settings(**files, output=tmp_path / "whole", **options))
    broken = tiny_settings(**files, output=tmp_path / "broken", **options)
    save = Checkpoints.save

    def die_at_two(self, state, at):
        save(self, state, at)
        if at.batches == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", die_at_two)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken)
    monkeypatch.undo()
    again = finetune(replace(broken, resume=True))
    assert again["eval"] == whole["eval"]
    paths = [tmp_path / name / "adapter.safetensors" for name in ("whole", "broken")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if "is_selection" in row] == [4]
    # Both programs are compiled, and neither is timed.
    assert [row["step"] for row in updates_of(rows) if row["is_compiling"]] == [1, 4]
    rates = [row["learning_rate"] / 3e-2 for row in updates_of(rows)]
    # Three updates rise at once and fall, and so do the three after the selection.
    np.testing.assert_allclose(rates, 2 * [1, 2 / 3, 1 / 3], rtol=1e-6)


@pytest.mark.slow
def test_an_average_is_evaluated_before_the_selection_and_after(files, tmp_path):
    options = {"where": ("query",), "max_steps": 3, "select_after": 2}
    options |= {"eval_on_start": True, "eval_every": 1}
    run = tiny_settings(
        **files, output=tmp_path / "run", optimizer="schedule_free_adamw", **options
    )
    metrics = finetune(run)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "split" in row] == [0, 1, 2, 3]
    assert evaluate_adapter(tmp_path / "run") == metrics["eval"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_after": 3}, "`select_after` must be less than 3, the updates of the"),
        (
            {"select_after": 1, "method": "lora"},
            "with a method that chooses no entries",
        ),
        ({"select_after": 1, "method": WITHOUT_HEAD}, "trains no parameters in full"),
        (
            {"select_after": 3, "optimizer": optax.sgd(1.0), "learning_rate": None},
            "`select_after` must be less than 3",
        ),
    ],
    ids=["as long as the run", "no entries", "nothing dense", "own optimizer"],
)
def test_updates_before_a_selection_that_never_comes_are_refused(
    files, tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        make_job(tiny_settings(**files, output=tmp_path, **changes))


@pytest.mark.parametrize(("asked", "updates"), [(0.0, 0), (0.4, 1), (2.0, 2)])
def test_updates_before_the_selection_are_a_number_or_a_fraction(
    files, tmp_path, asked, updates
):
    job = make_job(tiny_settings(**files, output=tmp_path, select_after=asked))
    assert job.total == 3
    assert job.select_after == updates


@pytest.mark.parametrize("asked", [-0.1, 1.5, float("nan")])
def test_a_fraction_above_one_is_no_number_of_updates(asked):
    with pytest.raises(InputError, match="`select_after` must be a fraction of the"):
        tiny_settings("m", "d", "o", select_after=asked)
