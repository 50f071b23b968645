"""The recipe of a run: optimizers by name, schedules, decay, and the loss."""

import json
import logging
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_run import tiny_settings, write_files
from tiny_text import CONFIG

from sparse_jax import Compact, InputError, LoRA, Settings, Sparse, finetune
from sparse_jax.data.glue import TASKS
from sparse_jax.models.decoder import Words
from sparse_jax.models.modules import noisy
from sparse_jax.training import compilation_cache
from sparse_jax.training.config_file import read_settings
from sparse_jax.training.objective import make_loss
from sparse_jax.training.optimizer import (
    averaged,
    learning_rate_at,
    make_optimizer,
    schedule_of,
)
from sparse_jax.training.output_folder import require_usable
from sparse_jax.training.recipe_options import OPTIMIZERS, SCHEDULES, RecipeOptions
from sparse_jax.training.setup import _class_weights

RUN = {"model": "m", "task": "sst2", "output": "o"}
VALUES = {
    "added": {},
    "leaves": {
        "layers": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))},
        "norm": {"scale": jnp.ones(3)},
        "classifier": {"kernel": jnp.ones((3, 4))},
    },
}


@pytest.mark.parametrize("warmup", [1, 5])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_those_of_transformers_from_their_second_update_on(kind, warmup):
    import torch
    from transformers import get_scheduler

    names = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
    extra = {"num_decay_steps": 10, "decay_type": "linear"} if kind == "wsd" else None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    known = get_scheduler(
        names.get(kind, kind), optimizer, warmup, 51, scheduler_specific_kwargs=extra
    )
    expected = [known.lr_lambdas[0](count + 1) for count in range(50)]
    schedule = schedule_of(1.0, 50, warmup, kind, 10)
    rates = [float(learning_rate_at(count, schedule)) for count in range(50)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.parametrize("word", OPTIMIZERS)
def test_an_optimizer_by_name_is_one_program_for_all_rates_and_decays(word):
    tx = make_optimizer(RecipeOptions(optimizer=word))
    step = jax.jit(tx.update)
    grads, state, moved = jax.tree.map(jnp.ones_like, VALUES), tx.init(VALUES), []
    for rate, decay in ((0.01, 0.0), (0.02, 0.5)):
        schedule = schedule_of(rate, 10, weight_decay=decay)
        updates, _ = step(grads, state, VALUES, schedule=schedule)
        moved.append(updates["leaves"])
    assert step._cache_size() == 1
    double, plain = moved[1], jax.tree.map(lambda leaf: 2 * leaf, moved[0])
    # Of a rate twice as large; biases and scales of norms do not decay.
    for path in (("layers", "bias"), ("norm", "scale")):
        pair = [tree[path[0]][path[1]] for tree in (double, plain)]
        np.testing.assert_allclose(*pair, rtol=1e-5)
    decays = word not in ("adam", "adagrad", "radam", "rmsprop", "sgd", "signum")
    # Schedule-free training moves a tenth of the way to its first step.
    share = {"schedule_free_adamw": 1.0, "adafactor": 0.0}.get(word, float(decays))
    for name in ("layers", "classifier"):
        gap = double[name]["kernel"] - plain[name]["kernel"]
        np.testing.assert_allclose(gap, -0.02 * 0.5 * share, atol=1e-6)


def test_muon_orthogonalizes_the_matrix_of_every_layer_for_itself():
    tx, schedule = make_optimizer(RecipeOptions(optimizer="muon")), schedule_of(1.0, 9)
    grads = jax.random.normal(jax.random.key(0), (2, 3, 4))
    values = {"added": {"up": {"a": grads}}, "leaves": {"word": grads[0]}}
    step, _ = tx.update(values, tx.init(values), values, schedule=schedule)
    alone = optax.contrib.muon(1.0)
    for layer in range(2):
        one = {"w": grads[layer]}
        expected, _ = alone.update(one, alone.init(one), one)
        np.testing.assert_allclose(
            step["added"]["up"]["a"][layer], expected["w"], atol=1e-5
        )
    # Outside the layers it is Adam's, whose first step is as long for all numbers.
    lengths = jnp.abs(step["leaves"]["word"])
    np.testing.assert_allclose(lengths, lengths[0, 0] * jnp.ones((3, 4)), rtol=1e-4)


def test_moments_may_be_bfloat16():
    state = make_optimizer(RecipeOptions(moment_dtype="bfloat16")).init(VALUES)
    for name, dtype in (("mu", "bfloat16"), ("nu", "float32")):
        leaves = jax.tree.leaves(optax.tree.get(state, name))
        assert {str(leaf.dtype) for leaf in leaves} == {dtype}


def test_of_a_sparse_leaf_the_chosen_entries_decay():
    loss = lambda params, x, key, attachment: (jnp.sum(params["w"] * x), 1.0)
    tuner = Compact(loss, Sparse(density=0.5, stack=None), make_optimizer())
    state = tuner.init({"w": jnp.array([4.0, 8.0])}, key := jax.random.key(0))
    x, step = jnp.array([1.0, 1e-30]), jax.jit(tuner.step)
    state, _ = jax.jit(tuner.select)(state, x, key)
    ends = [
        step(state, x, key, schedule=schedule_of(0.1, 1, weight_decay=decay))[0]
        for decay in (0.0, 0.5)
    ]
    expected = [[4 - 0.1, 8.0], [4 - 0.1 - 0.1 * 0.5 * 4, 8.0]]
    for end, values in zip(ends, expected, strict=True):
        np.testing.assert_allclose(end.params["w"], values, rtol=1e-6)


def test_schedule_free_training_is_evaluated_at_its_average():
    loss = lambda params, x, key, attachment: (jnp.sum(params["w"] * x), 1.0)
    tx = make_optimizer(RecipeOptions(optimizer="schedule_free_adamw"))
    tuner = Compact(loss, Sparse(density=0.5, stack=None), tx)
    params = {"w": jnp.array([4.0, 8.0], jnp.bfloat16)}
    state, x = tuner.init(params, key := jax.random.key(0)), jnp.array([1.0, 1e-30])
    state, _ = jax.jit(tuner.select)(state, x, key)
    schedule, step = schedule_of(0.1, 3, 0, "constant"), jax.jit(tuner.step)
    for _ in range(3):
        state, _ = step(state, x, key, schedule=schedule)
    mean = averaged(tuner, state)
    # Of z = 3.9, 3.8 and 3.7; the gradient is taken a tenth of the way to the last.
    np.testing.assert_allclose(mean.masters["w"], [3.8], atol=1e-3)
    np.testing.assert_allclose(state.masters["w"], [0.9 * 3.8 + 0.1 * 3.7], atol=1e-3)
    assert mean.params["w"].tolist() == [float(jnp.bfloat16(3.8)), 8.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamv"}, "nearest are adam or radam. In Python any"),
        ({"optimizer": "muon"}, "a method that chooses entries, got 'muon', which"),
        ({"optimizer": "adafactor", "method": "lift"}, "must be one of .*'adafactor'"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "'sgd', got 0.1. In Optax.*adamw"),
        ({"optimizer": "sgd", "betas": (0.9, 0.9)}, "`betas` must be left out with"),
        ({"optimizer": "sgd", "moment_dtype": "bfloat16"}, "`moment_dtype` must be le"),
        ({"schedule": "sine"}, "`schedule` must be one of linear, cosine, co"),
        ({"cooldown": 0.1}, "left out with schedule 'linear', got 0.1"),
        (
            {"optimizer": "schedule_free_adamw", "schedule": "cosine"},
            "`schedule` must be constant with optimizer 'schedule_free_adamw'",
        ),
        (
            {"optimizer": "schedule_free_adamw", "sampler": "ist"},
            "`optimizer` must not be 'schedule_free_adamw' with a sampler",
        ),
        ({"betas": (0.9, 1.0)}, r"`betas` must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "`betas` must be two numbers"),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or more, got -0.1"),
        ({"eps": float("inf")}, "`eps` must be 0 or more and finite, got inf"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive, got -1.0"),
        (
            {"learning_rate": float("inf")},
            "`learning_rate` must be positive and finite, got inf",
        ),
        (
            {"clip_by": "previous-norm", "max_grad_norm": 0.0},
            "`clip_by` must be left out with `max_grad_norm=0`, got 'previous-norm'.",
        ),
        ({"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\), got 1.0"),
        ({"warmup": 1.5}, "`warmup` must be a fraction of the updates"),
        ({"task": "causal", "class_weights": "balanced"}, "`class_weights` must be"),
        (
            {"optimizer": optax.sgd(1.0), "max_grad_norm": 2.0},
            "`max_grad_norm` must be left out with an optimizer",
        ),
    ],
)  # fmt: skip
def test_recipes_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Settings(**{**RUN, **changes})


def test_optimizers_of_matrices_go_with_methods_of_whole_arrays():
    assert Settings(**RUN, optimizer="muon", method="lora").optimizer == "muon"
    assert Settings(**RUN, optimizer="adafactor", method=LoRA(rank=2)).betas is None


def test_a_cooldown_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match="`cooldown` must be at most 6, the updates"):
        schedule_of(1.0, 10, 5, "wsd", 7)


def test_the_noise_of_neftune_is_that_of_the_paper():
    words = noisy(jnp.zeros((3, 4, 25)), 5.0, jax.random.key(0))
    assert 0.45 < float(jnp.max(jnp.abs(words))) <= 5.0 / (4 * 25) ** 0.5
    assert noisy(words, 5.0, None) is words


def test_the_noise_is_as_large_for_words_that_are_scaled():
    words = Words(replace(CONFIG, scales_words=True), nnx.Rngs(0))
    ids, key = jnp.zeros((1, 4), jnp.int32), jax.random.key(0)
    noise = words(ids, ids, key, 5.0) - words(ids, ids, None)
    # 5 / sqrt(4 tokens * 16), while the words are times 4.
    assert 0.5 < float(jnp.max(jnp.abs(noise))) <= 0.6251


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_classes_is_that_of_pytorch(weights, smoothing):
    import torch

    logits, labels = np.random.default_rng(0).normal(size=(5, 3)), [0, 1, 2, 1, 1]
    model = lambda *args, **options: jnp.asarray(logits, jnp.float32)
    loss = make_loss(model, label_smoothing=smoothing, class_weights=weights)
    batch = {"labels": jnp.array(labels), "weights": jnp.ones(5)}
    total, weight = loss({}, batch, None, None)
    each = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), reduction="none",
        label_smoothing=smoothing,
    )  # fmt: skip
    scale = torch.tensor(weights or [1.0] * 3)[labels]
    expected = float((each * scale).sum() / scale.sum())
    np.testing.assert_allclose(total / weight, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Has the programs of a test kept in a folder that is named as users name it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("SPARSE_JAX_CACHE", str(tmp_path / "cache"))
    jax.config.update(names[0], None)
    jax.config.update(names[1], 0.0)
    yield tmp_path / "cache"
    compilation_cache._set(before[names[0]])
    jax.config.update(names[1], before[names[1]])


def test_a_second_run_with_other_numbers_compiles_nothing(
    files, tmp_path, own_cache, caplog
):
    caplog.set_level(logging.INFO, "sparse_jax")
    found = []
    told = lambda: [line for line in caplog.messages if "are kept in" in line]
    listen = lambda event, **_: found.append(event)
    settings = tiny_settings(
        **files, output=tmp_path / "1", method="bitfit", max_steps=2,
        label_smoothing=0.1, class_weights="negative=1,positive=2", neftune_noise=5.0,
        betas=(0.9, 0.98),
    )  # fmt: skip
    finetune(replace(settings, dry_run=True))
    # Nothing has been compiled yet.
    assert not told()
    finetune(settings)
    (folder,) = own_cache.iterdir()
    assert any(folder.iterdir())
    other = replace(
        settings, output=str(tmp_path / "2"), learning_rate=1e-3, weight_decay=0.1,
        warmup=1, max_steps=3, schedule="cosine",
    )  # fmt: skip
    jax.monitoring.register_event_listener(listen)
    try:
        finetune(other)
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(told()) == 1 and str(folder) in told()[0]
    assert "/jax/compilation_cache/cache_hits" in found
    assert "/jax/compilation_cache/cache_misses" not in found
    recorded = json.loads((tmp_path / "2" / "config.json").read_text())["settings"]
    assert recorded["betas"] == [0.9, 0.98]
    assert read_settings(tmp_path / "2" / "config.json")["betas"] == (0.9, 0.98)
    # As earlier versions recorded the run, which had one name for an optimizer.
    recorded["optimizer"] = None
    for name in ("schedule", "weight_decay", "betas", "neftune_noise", "no_cache"):
        del recorded[name]
    (tmp_path / "2" / "config.json").write_text(json.dumps({"settings": recorded}))
    assert "optimizer" not in read_settings(tmp_path / "2" / "config.json")
    known = replace(
        other, schedule=None, weight_decay=0.0, betas=None, neftune_noise=0.0
    )
    require_usable(replace(known, resume=True))
    with pytest.raises(InputError, match="`optimizer` must be 'adamw' as in the run"):
        require_usable(replace(known, resume=True, optimizer="lion"))


def test_class_weights_name_labels_that_there_are_once():
    labels, task = np.array([0, 0, 1]), TASKS["sst2"]
    weigh = lambda said: _class_weights(
        Settings(**RUN, class_weights=said), task, labels
    )
    assert weigh("positive=3") == [1.0, 3.0]
    assert weigh("balanced") == [0.75, 1.5]
    for said, message in (
        ("good=2", "must be balanced, or pairs .* got 'good=2'"),
        ("negative=1,negative=2", "each label once, got 'negative=2' in"),
        ("negative=0,positive=0", "must have one above 0, got 'negative=0,posit"),
    ):
        with pytest.raises(InputError, match=message):
            weigh(said)


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_JAX_CACHE", str(tmp_path / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(compilation_cache, "_set", lambda folder: None)
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            compilation_cache.use_compilation_cache()
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
    assert "cannot be written" in caplog.text
    for name in ("off", ""):
        monkeypatch.setenv("SPARSE_JAX_CACHE", name)
        assert compilation_cache.cache_folder() is None
    monkeypatch.delenv("SPARSE_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert compilation_cache.cache_folder().parent == tmp_path / "sparse_jax"
