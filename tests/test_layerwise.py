"""A few layers at a time in the compact tier: the numbers of the Optax tier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_compact import (
    CONFIG,
    loss,
    make_batch,
    make_params,
    run_compact,
)

from sparse_jax import (
    Attachment,
    Compact,
    Dense,
    Fixed,
    GradientNorm,
    Importance,
    Layerwise,
    LoRA,
    Sparse,
    Static,
    Uniform,
    ist,
)
from sparse_jax.errors import InputError
from sparse_jax.supports.masters import current_values

LAYERS = CONFIG.num_layers
SIZES = {"num_layers": LAYERS, "num_active": 1}
HEAD = "^classifier/"
METHODS = {
    "lora": LoRA(rank=2, where="attention/(query|value)|mlp/up", dense=HEAD),
    "sift": Sparse(density=0.1, where="^layers/.*(query|up)/", dense=HEAD),
    "full layers": Dense(dense=("^layers/", HEAD)),
    "biases": Dense(dense=("^layers/.*bias", HEAD)),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# Biases are dense leaves as those of full layers are.
main_methods = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[pytest.mark.slow] * (name == "biases"))
        for name, method in METHODS.items()
    ],
)
# Not Adam: the gradient of the key's bias is zero but for rounding, which Adam would
# blow up to whole steps.
TX = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))


def tuner_of(method, tx=TX, **options):
    options = {"sampler": Uniform(**SIZES), **options}
    return Layerwise(loss, method, tx, **options)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=rtol, atol=atol)


def test_a_word_is_a_sampler_of_a_quarter_of_the_layers():
    params = make_params()
    named, made = (
        tuner_of(METHODS["biases"], sampler=sampler)
        for sampler in ("norm", GradientNorm(**SIZES))
    )
    assert named.sampler_for(params) == made.sampler
    states = [run_compact(tuner, params, 2)[0] for tuner in (named, made)]
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)
    for wrong in ("lisa", Uniform, None):
        with pytest.raises(InputError, match="`sampler` must be a `Sampler`, or one"):
            tuner_of(METHODS["biases"], sampler=wrong)


@every_method
@pytest.mark.parametrize(
    "recompute",
    [
        "none",
        pytest.param("frozen", marks=pytest.mark.slow),
        pytest.param("all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.quick(1)
def test_all_layers_active_is_the_compact_tier(method, recompute):
    every = Static.of(0, 1, 2, num_layers=LAYERS)
    tuner = tuner_of(method, sampler=every, recompute=recompute)
    state, losses = run_compact(tuner, make_params(), 4)
    expected, expected_losses = run_compact(Compact(loss, method, TX), make_params(), 4)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_close((state.params, state.added), (expected.params, expected.added))


@pytest.mark.parametrize(
    "sampler",
    [Uniform(**SIZES), GradientNorm(**SIZES, decay=0.5),
     Importance(**SIZES, num_suppressed=1, probe_every=2)],
    ids=["uniform", "norms", "importance"],
)  # fmt: skip
@pytest.mark.quick(1)
def test_it_gives_the_numbers_of_the_optax_tier(sampler):
    tuner = tuner_of(METHODS["full layers"], sampler=sampler, seed=5)
    state, losses = run_compact(tuner, make_params(), 6)
    params = make_params()

    def value_fn(strength, now, batch):
        damp = lambda start, now: (
            start + strength.reshape(-1, *[1] * (now.ndim - 1)) * (now - start)
        )
        layers = jax.tree.map(damp, params["layers"], now["layers"])
        return loss({**now, "layers": layers}, batch, None, Attachment())[0] / 8

    tx = ist(
        TX, layer_of="^layers/", key=jax.random.key(5), sampler=sampler,
        always_on=HEAD, **SIZES,
    )  # fmt: skip
    opt_state, now = tx.init(params), params
    mean = lambda params, batch: loss(params, batch, None, Attachment())[0] / 8

    @jax.jit
    def step(now, opt_state, batch):
        value, grads = jax.value_and_grad(mean)(now, batch)
        ask = lambda strength: value_fn(strength, now, batch)
        updates, opt_state = tx.update(grads, opt_state, now, value_fn=ask)
        return optax.apply_updates(now, updates), opt_state, value

    for i in range(6):
        now, opt_state, value = step(now, opt_state, make_batch(i))
        np.testing.assert_allclose(losses[i], value, rtol=1e-5)
    ours, theirs = state.opt_state.sampler, opt_state.sampler
    np.testing.assert_array_equal(ours.active, theirs.active)
    assert_close(ours.memory, theirs.memory, rtol=1e-4, atol=1e-5)
    assert_close(state.params, now)


@main_methods
@pytest.mark.quick(1)
def test_frozen_layers_stay_to_the_last_bit(method):
    tuner = tuner_of(method, sampler=Static.of(1, num_layers=LAYERS))
    start = jax.jit(tuner.init)(make_params(), jax.random.key(1))
    start, _ = jax.jit(tuner.select)(start, make_batch(0), jax.random.key(0))
    state, _ = jax.jit(tuner.step)(start, make_batch(0), jax.random.key(0))
    state, _ = jax.jit(tuner.step)(state, make_batch(1), jax.random.key(1))
    pick = lambda state: (state.params["layers"], state.added)
    moved = np.zeros(LAYERS, bool)
    for x, y in zip(
        jax.tree.leaves(pick(start)), jax.tree.leaves(pick(state)), strict=True
    ):
        moved |= np.any(np.array(x != y).reshape(LAYERS, -1), axis=1)
    assert moved.tolist() == [False, True, False]
    assert int(state.count) == 2


class OfAll(Static):
    """The layers of a list, of which it does not say that they are always these."""

    reachable = tuple(range(LAYERS))


@pytest.mark.parametrize("name", ["lora", "sift"])
@pytest.mark.quick(1)
def test_layers_that_are_never_active_have_no_state_of_the_optimizer(name):
    def trained(rule):
        tuner = tuner_of(METHODS[name], sampler=rule.of(0, 2, num_layers=LAYERS))
        state, _ = run_compact(tuner, make_params(), 2)
        return state, state.opt_state.rows

    (few, rows), (whole, all_rows) = trained(Static), trained(OfAll)
    assert LAYERS == 3
    for row, of_all in zip(
        jax.tree.leaves(rows), jax.tree.leaves(all_rows), strict=True
    ):
        assert (len(row), len(of_all)) == (2, 3)
        np.testing.assert_array_equal(row, of_all[jnp.array([0, 2])])
    for tree in ("params", "support", "masters", "added"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(few, tree), getattr(whole, tree)
        )


def test_a_layer_of_proportion_zero_is_never_reached():
    rule = Fixed(num_layers=3, num_active=1, proportions=(0.5, 0.0, 0.5))
    assert (rule.reachable, rule.is_constant, rule.reached(9)) == ((0, 2), False, 6)
    assert Static.of(1, num_layers=3).is_constant


def test_sparse_entries_move_inside_their_support_only():
    tuner = tuner_of(METHODS["sift"], sampler=Static.of(0, 2, num_layers=LAYERS))
    params = make_params()
    state, _ = run_compact(tuner, params, 3)
    kernel = "layers", "attention", "query", "kernel"
    get = lambda tree: tree[kernel[0]][kernel[1]][kernel[2]][kernel[3]]
    moved = np.array(get(state.params) != get(params)).reshape(LAYERS, -1)
    # 10 % of 16 x 16 entries, rounded up.
    assert moved.sum(axis=1).tolist() == [26, 0, 26]
    assert np.flatnonzero(moved[2]).tolist() == get(state.support)[2].tolist()


@main_methods
@pytest.mark.quick(1)
def test_bfloat16_weights_keep_float32_masters(method):
    params, tx = make_params(jnp.bfloat16), optax.adamw(1e-3)
    steps = 50 if method is METHODS["sift"] else 3
    state, losses = run_compact(tuner_of(method, tx), params, steps)
    assert np.isfinite(losses).all()
    for master in jax.tree.leaves(state.masters):
        assert master.dtype == jnp.float32
    get = lambda tree: tree["layers"]["mlp"]["up"]["kernel"]
    if method is METHODS["sift"]:
        chosen = jnp.take_along_axis(
            get(state.params).reshape(LAYERS, -1), get(state.support), axis=1
        )
        np.testing.assert_array_equal(chosen, get(state.masters).astype(jnp.bfloat16))
        # In halves they are the same, and so is all else.
        tuner = tuner_of(method, tx, split_masters=True)
        split, same = run_compact(tuner, params, steps)
        assert losses == same
        trees = (tuner.roles(params), split.support, split.masters, split.params)
        equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
        equal(current_values(*trees), state.masters)
        equal(split.opt_state.rows, state.opt_state.rows)
        equal(split.params, state.params)


@main_methods
@pytest.mark.quick(1)
def test_the_strength_runs_from_the_base_model_to_the_trained_one(method):
    sampler = Importance(**SIZES, num_suppressed=1)
    tuner = tuner_of(method, optax.adam(1e-2), sampler=sampler)
    params = make_params()
    state, _ = run_compact(tuner, params, 4)
    batch, roles = make_batch(9), method.roles(params)
    value = jax.jit(lambda strength: tuner._value(roles, state, batch, strength))
    now = loss(state.params, batch, None, tuner.attach(state))[0] / 8
    np.testing.assert_allclose(value(jnp.ones(LAYERS)), now, rtol=1e-5)
    # The head is trained, and not damped.
    base = {**params, "classifier": state.params["classifier"]}
    start = loss(base, batch, None, Attachment())[0] / 8
    np.testing.assert_allclose(value(jnp.zeros(LAYERS)), start, rtol=1e-5)
    assert abs(float(now) - float(start)) > 5e-5


def test_one_program_serves_all_choices_of_layers():
    tuner = tuner_of(METHODS["lora"])
    traces = []

    @jax.jit
    def step(state, batch, key):
        traces.append(1)
        return tuner.step(state, batch, key)

    state = jax.jit(tuner.init)(make_params(), jax.random.key(1))
    chosen = set()
    for i in range(200):
        state, metrics = step(state, make_batch(i % 3), jax.random.key(i))
        chosen.add(int(metrics["active"][0]))
    assert len(traces) == 1 and step._cache_size() == 1
    assert chosen == {0, 1, 2}


def test_accumulation_gives_the_whole_batch():
    tuner = tuner_of(METHODS["sift"], optax.sgd(0.1))
    parts = tuner_of(METHODS["sift"], optax.sgd(0.1), accumulate=2)
    cut = lambda seed: jax.tree.map(
        lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), make_batch(seed)
    )
    # The same entries in both: the first micro-batch alone would choose others.
    start = jax.jit(tuner.init)(make_params(), jax.random.key(1))
    start, _ = jax.jit(tuner.select)(start, make_batch(0), jax.random.key(0))
    whole, metrics = jax.jit(tuner.step)(start, make_batch(0), jax.random.key(0))
    split, others = jax.jit(parts.step)(start, cut(0), jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
    assert_close(whole.params, split.params)


def test_the_norm_of_all_that_is_trained_is_clipped():
    tuner = tuner_of(METHODS["full layers"], optax.sgd(1.0), max_norm=0.1)
    params = make_params()
    state = jax.jit(tuner.init)(params, jax.random.key(1))
    after, metrics = jax.jit(tuner.step)(state, make_batch(0), jax.random.key(0))
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, params))
    assert float(metrics["gradient_norm"]) > 0.1
    np.testing.assert_allclose(moved, 0.1, rtol=1e-4)


def test_a_restart_gives_a_layer_a_fresh_state():
    sampler = Fixed(**SIZES, proportions=(1.0, 1.0, 1.0))
    tuner = tuner_of(METHODS["lora"], optax.adam(1e-3), sampler=sampler, restart=True)
    step = jax.jit(tuner.step)
    state = jax.jit(tuner.init)(make_params(), jax.random.key(1))
    last, run = None, 0
    for i in range(12):
        state, metrics = step(state, make_batch(i), jax.random.key(i))
        layer = int(metrics["active"][0])
        run = run + 1 if layer == last else 1
        last = layer
        counts = np.array(optax.tree.get(state.opt_state.rows, "count"))
        assert counts[layer] == run


def test_a_method_without_a_stack_is_refused():
    method = Dense(dense=".*", stack=None)
    with pytest.raises(InputError, match="`stack` of the method must name"):
        tuner_of(method)


def test_the_first_step_may_be_given_the_state_right_after_init():
    probing = Importance(**SIZES, num_suppressed=1, probe_every=1)
    tuner = tuner_of(METHODS["biases"], sampler=probing)
    state = tuner.init(make_params(), jax.random.key(0))
    # One array in two places of the state could not be given away.
    step = jax.jit(tuner.step, donate_argnums=0)
    for i in range(2):
        state, _ = step(state, make_batch(i), jax.random.key(i))
    assert int(state.count) == 2
