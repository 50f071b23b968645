"""The compact tier gives the numbers of the Optax tier, without dense gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import Attachment, Compact, Dense, LoRA, Sparse, sift
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier

CONFIG = EncoderConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    intermediate_size=32,
    num_labels=2,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
MODEL = Model(SequenceClassifier, BERT, CONFIG)
WHERE, HEAD = "query/kernel|up/kernel|word", "^classifier/"


def loss(params, batch, key, attachment):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    # A loop over the layers compiles in a third of the time.
    logits = MODEL(params, inputs, key=None, attachment=attachment, unroll=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.sum(), losses.size


def make_batch(seed, size=8):
    ids = jax.random.randint(jax.random.key(seed), (size, 12), 1, 50)
    labels = jax.random.randint(jax.random.key(seed + 1000), (size,), 0, 2)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": labels}


def make_params(dtype=jnp.float32):
    params = MODEL.init(jax.random.key(0), dtype)
    # The default spread of 0.02 gives gradients too small to tell methods apart.
    return jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, params)


def run_compact(tuner, params, steps, make=make_batch):
    state = jax.jit(tuner.init)(params, jax.random.key(1))
    state, finite = jax.jit(tuner.select)(state, make(0), jax.random.key(0))
    assert bool(finite)
    step = jax.jit(tuner.step, donate_argnums=0)
    # The state given away must not hold the caller's arrays.
    state = jax.tree.map(jnp.copy, state)
    losses = []
    for i in range(steps):
        state, metrics = step(state, make(i), jax.random.key(i))
        losses.append(float(metrics["loss"]))
    return state, losses


def run_optax(tx, params, steps):
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        mean = lambda params: loss(params, batch, None, Attachment())[0] / 8
        value, grads = jax.value_and_grad(mean)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses = []
    for i in range(steps):
        params, opt_state, value = step(params, opt_state, make_batch(i))
        losses.append(float(value))
    return params, opt_state, losses


def assert_close(a, b, atol):
    as_float = lambda x: np.asarray(x, np.float32)
    check = lambda x, y: np.testing.assert_allclose(
        as_float(x), as_float(y), rtol=0, atol=atol
    )
    jax.tree.map(check, a, b)


@pytest.mark.parametrize(
    ("score", "dtype"),
    [
        ("gradient", jnp.float32),
        pytest.param("gradient", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("gradient/magnitude", jnp.float32, marks=pytest.mark.slow),
        pytest.param("magnitude", jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_both_tiers_select_the_same_and_train_alike(score, dtype):
    params = make_params(dtype)
    inner = optax.adamw(1e-2, weight_decay=0.1)
    tx = sift(inner, 0.05, where=WHERE, dense=HEAD, stacked="^layers/", score=score)
    expected, opt_state, their_losses = run_optax(tx, params, 6)
    method = Sparse(density=0.05, where=WHERE, dense=HEAD, score=score)
    state, losses = run_compact(Compact(loss, method, inner), params, 6)
    jax.tree.map(np.testing.assert_array_equal, state.support, opt_state.support)
    exact = dtype == jnp.float32
    np.testing.assert_allclose(losses, their_losses, rtol=1e-5 if exact else 2e-2)
    # Adam turns the rounding of a tiny gradient into a rounding of its step.
    assert_close(state.params, expected, 2e-5 if exact else 2e-2)
    assert losses[-1] < losses[0]


def test_only_the_support_and_the_head_move():
    params = make_params()
    method = Sparse(density=0.02, where="attention/query/kernel", dense=HEAD)
    inner = optax.adamw(1e-2, weight_decay=0.5)
    state, _ = run_compact(Compact(loss, method, inner), params, 5)
    moved = jax.tree.map(lambda a, b: np.flatnonzero(a != b), params, state.params)
    query = moved["layers"]["attention"]["query"]["kernel"]
    support = state.support["layers"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(
        query, (support + 256 * np.arange(3)[:, None]).ravel()
    )
    assert moved.pop("classifier")["kernel"].size == 32
    others = sum(leaf.size for leaf in jax.tree.leaves(moved)) - query.size
    assert others == 0


def test_micro_batches_add_up_to_the_batch():
    params = make_params()
    method = Sparse(density=0.05, where=WHERE, dense=HEAD, score="magnitude")
    fold = lambda i: jax.tree.map(
        lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), make_batch(i)
    )
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5))
    whole, losses = run_compact(Compact(loss, method, inner), params, 4)
    tuner = Compact(loss, method, inner, accumulate=4)
    parts, part_losses = run_compact(tuner, params, 4, make=fold)
    np.testing.assert_allclose(part_losses, losses, rtol=1e-5)
    assert_close(parts.params, whole.params, 1e-6)


@pytest.fixture(scope="module")
def plain_run():
    """Returns the state and the losses of three updates, layer after layer."""
    method = Sparse(density=0.05, where=WHERE)
    return run_compact(Compact(loss, method, optax.sgd(0.1)), make_params(), 3)


LAYERS = {"checkpointed": {"checkpoint": True}, "unrolled": {"unroll": 3}}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.quick(1)
def test_the_way_the_layers_run_does_not_matter(layers, plain_run):
    again = lambda params, batch, key, attachment: (
        optax.softmax_cross_entropy_with_integer_labels(
            MODEL(params, batch, attachment=attachment, **layers),
            batch["labels"],
        ).sum(),
        8,
    )
    tuner = Compact(again, Sparse(density=0.05, where=WHERE), optax.sgd(0.1))
    state, losses = run_compact(tuner, make_params(), 3)
    np.testing.assert_allclose(plain_run[1], losses, rtol=1e-6)
    assert_close(plain_run[0].params, state.params, 1e-6)


def test_full_fine_tuning_is_the_optimizer_itself():
    params = make_params()
    expected, _, losses = run_optax(optax.adam(1e-3), params, 4)
    tuner = Compact(loss, Dense(dense=".*"), optax.adam(1e-3))
    state, ours = run_compact(tuner, params, 4)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert_close(state.params, expected, 2e-5)


def test_lora_starts_at_the_base_model_and_merges_into_it():
    params = make_params()
    method = LoRA(rank=2, where="attention/(query|value)", dense=HEAD)
    tuner = Compact(loss, method, optax.adam(1e-2))
    state = tuner.init(params, jax.random.key(1))
    batch = {k: v for k, v in make_batch(0).items() if k != "labels"}
    base = MODEL(params, batch)
    np.testing.assert_array_equal(
        MODEL(params, batch, attachment=tuner.attach(state)), base
    )
    state, losses = run_compact(tuner, params, 6)
    assert losses[-1] < losses[0]
    assert state.added["attention/query"]["a"].shape == (3, 16, 2)
    adapted = MODEL(state.params, batch, attachment=tuner.attach(state))
    merged = MODEL(method.merge(state.params, state.added), batch)
    assert float(jnp.abs(adapted - base).max()) > 1e-3
    np.testing.assert_allclose(adapted, merged, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "split", "most"),
    [(jnp.float32, False, 12), (jnp.bfloat16, False, 16), (jnp.bfloat16, True, 14)],
    ids=["f32", "bf16", "split"],
)
def test_state_beside_the_weights_is_at_most_16_bytes_an_entry(dtype, split, most):
    method = Sparse(density=0.1, where="kernel")
    tuner = Compact(loss, method, optax.adam(1e-3), split_masters=split)
    state = tuner.init(make_params(dtype), jax.random.key(0))
    entries = sum(leaf.size for leaf in jax.tree.leaves(state.support))
    small = state._replace(params=())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
    assert size == most * entries + 2 * 4  # and two counters


def test_a_compiled_step_holds_no_second_copy_of_a_weight():
    tuner = Compact(loss, Sparse(density=0.05, where=WHERE), optax.adam(1e-3))
    state = jax.jit(tuner.init)(make_params(), jax.random.key(0))
    state, _ = jax.eval_shape(tuner.select, state, make_batch(0), jax.random.key(0))
    step = jax.jit(tuner.step, donate_argnums=0)
    compiled = step.lower(state, make_batch(0), jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


def test_a_batch_with_a_gradient_that_is_not_finite_does_not_select():
    broken = lambda params, batch, key, attachment: (
        loss(params, batch, key, attachment)[0] * jnp.nan, 8,
    )  # fmt: skip
    method = Sparse(density=0.05, where=WHERE)
    state = Compact(loss, method, optax.sgd(0.1)).init(make_params(), jax.random.key(0))
    tuner = Compact(broken, method, optax.sgd(0.1))
    after, finite = jax.jit(tuner.select)(state, make_batch(0), jax.random.key(0))
    assert not bool(finite)
    jax.tree.map(np.testing.assert_array_equal, after.support, state.support)


def test_random_supports_differ_between_layers():
    method = Sparse(density=0.1, where="query/kernel", score="random")
    state, _ = run_compact(Compact(loss, method, optax.sgd(0.1)), make_params(), 1)
    first, second, _ = state.support["layers"]["attention"]["query"]["kernel"]
    assert (np.asarray(first) != np.asarray(second)).any()


def test_the_step_compiles_once():
    traces = []

    def counted(*args):
        traces.append(1)
        return loss(*args)

    tuner = Compact(counted, Sparse(density=0.05, where=WHERE), optax.adam(1e-3))
    run_compact(tuner, make_params(), 4)
    assert len(traces) == 2  # one selection, one step


def test_a_model_without_a_stack_is_tapped_leaf_by_leaf():
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    square = lambda params, x, key, attachment: (jnp.sum((x @ params["w"]) ** 2), 1)
    method = Sparse(density=0.5, stack=None)
    tuner = Compact(square, method, optax.sgd(0.01))
    make = lambda i: jnp.array([[1.0, 3.0]])
    state, _ = run_compact(tuner, params, 1, make=make)
    # dW = 2 x^T (x W) with x W = [9, 13, 17]: the second row, three times the first,
    # wins, and moves by 0.01 * [54, 78, 102].
    np.testing.assert_array_equal(state.support["w"], [3, 4, 5])
    np.testing.assert_allclose(
        state.params["w"], [[0, 1, 2], [2.46, 3.22, 3.98]], rtol=1e-5
    )
