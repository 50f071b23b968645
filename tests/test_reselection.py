"""Choosing entries again, with what was trained before kept."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_scores import loss
from tiny_run import tiny_settings, write_files

from sparse_jax import (
    Adapter,
    Compact,
    InputError,
    Sparse,
    evaluate_adapter,
    finetune,
    load_adapter,
    sift,
)
from sparse_jax.compact.selection import reselect
from sparse_jax.supports.masters import current_values
from sparse_jax.training.build import make_job
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.start import note_entries

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def draw(seed, dtype=jnp.float32):
    normal = functools.partial(jax.random.normal, dtype=dtype)
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "layers": {"w": normal(first, (3, 128, 2))},
        "head": normal(second, (128,)),
    }


# Of the second selection, one by one of the table of scores: what it looks at changes.
@pytest.mark.parametrize(("score", "split"), [("gradient", False), ("lift", True)])
@pytest.mark.quick(1)
def test_both_tiers_choose_again_and_carry_the_same(score, split):
    params = draw(0, jnp.bfloat16)
    inner, rules = optax.adam(0.3), {"density": 0.1, "score": score}
    tx = sift(inner, **rules, stacked="layers", reselect_every=2)
    theirs, opt = params, tx.init(params)
    tuner = Compact(loss, Sparse(**rules), inner, split_masters=split)
    state = tuner.init(params, KEY)
    # One that left and came back would start from a parameter that is rounded twice.
    for i in range(4):
        grads = draw(i + 1, jnp.bfloat16)
        updates, opt = jax.jit(tx.update)(grads, opt, theirs)
        theirs = optax.apply_updates(theirs, updates)
        if i % 2 == 0:
            choose = functools.partial(reselect, tuner) if i else tuner.select
            state, finite = jax.jit(choose)(state, grads, KEY)
            assert finite
        state, _ = jax.jit(tuner.step)(state, grads, KEY)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(state.support, opt.support)
    # The transformation adds a step to a parameter, which rounds it once more.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    trees = (tuner.roles(params), state.support, state.masters, state.params)
    jax.tree.map(near, current_values(*trees), opt.masters)
    same(optax.tree.get(state.opt_state, "mu")["leaves"], opt.inner_state[0].mu)
    assert optax.tree.get(state.opt_state, "count") == 4 == state.count


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_changes_nothing():
    tuner, params = Compact(loss, Sparse(density=0.1), optax.adam(0.3)), draw(0)
    state, _ = tuner.select(tuner.init(params, KEY), draw(1), KEY)
    state, _ = tuner.step(state, draw(1), KEY)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, draw(2))
    after, finite = reselect(tuner, state, bad, KEY)
    assert not finite
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_layers_with_fewer_entries_are_filled_outside_those_of_other_adapters():
    tuner = Compact(loss, Sparse(density=1 / 8), optax.sgd(1.0))
    state = tuner.init({"layers": {"w": jnp.zeros((2, 8))}}, KEY)
    other, known = Adapter({"layers/w": np.array([[0], [0]])}), {}
    for support in ([[5], [6]], [[5], [7]]):
        chosen = state._replace(support={"layers": {"w": jnp.array(support)}})
        note_entries(known, tuner, chosen, [other])
    assert known["layers/w"].tolist() == [[1, 5], [6, 7]]


AGAIN = {
    "reselect_every": 1, "learning_rate": 0.1, "batch_size": 6, "save_every": 1,
    "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.slow
def test_a_run_that_chooses_again_resumes_bit_for_bit_and_its_adapter_has_it_all(
    files, tmp_path, monkeypatch
):
    # The other kind of masters goes on from the same checkpoint.
    again = {**AGAIN, "split_masters": True}
    whole = finetune(tiny_settings(**files, output=tmp_path / "whole", **again))
    broken = tiny_settings(**files, output=tmp_path / "broken", **AGAIN)
    save = Checkpoints.save

    def die_at_three(self, state, at):
        save(self, state, at)
        if at.batches == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", die_at_three)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken)
    monkeypatch.undo()
    finetune(replace(broken, resume=True))
    paths = [tmp_path / name / "adapter.safetensors" for name in ("whole", "broken")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # More than one selection has, and all that the model needs.
    support = load_adapter(paths[0]).support["layers/attention/query/kernel"]
    assert support.shape[1] > np.ceil(0.1 * 16 * 16)
    found = evaluate_adapter(paths[0], data=str(files["data"]))
    assert found == whole["eval"]


NOT_AGAIN = {
    "no entries": ({"method": "lora"}, "a method that chooses no entries"),
    "layers": ({"sampler": "ist"}, "a sampler: train all layers"),
    "shards": ({"mesh": "fsdp=8"}, "sharded weights"),
    # Each selection sums gradients since the last one, which `sift` gets one by one.
    "by more than come between": (
        {"select_batches": 4},
        "`reselect_every` must be at least `select_batches=4`, got 2. Leave it out",
    ),
    "never": ({"reselect_every": 0}, "`reselect_every` must be positive"),
}


@pytest.mark.parametrize(("changes", "message"), NOT_AGAIN.values(), ids=NOT_AGAIN)
def test_choosing_again_is_refused_where_it_cannot_be_done(
    changes, message, files, tmp_path
):
    options = {"reselect_every": 2, **changes}
    with pytest.raises(InputError, match=message):
        make_job(tiny_settings(**files, output=tmp_path / "run", **options))
