"""IST as an Optax transformation: what moves, what stays, and how it is told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import Fixed, GradientNorm, Static, ist
from sparse_jax.errors import InputError
from sparse_jax.samplers.sampler import advance, begin

LAYERS = 6
KEY = jax.random.key(0)
SIZES = {"num_layers": LAYERS, "num_active": 2}


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def stacked_params():
    return {"layers": {"a": draw(0, LAYERS, 3), "b": draw(1, LAYERS)}, "head": draw(2)}


def listed_params():
    params = stacked_params()
    layers = {
        str(i): jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        for i in range(LAYERS)
    }
    return {"layers": layers, "head": params["head"]}


def listed(tree):
    """Returns the stacks of a tree cut into layers."""
    layers = {
        str(i): jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"])
        for i in range(LAYERS)
    }
    return {**tree, "layers": layers}


STACKED, LISTED = "^layers/", r"^layers/(\d+)/"


def make(inner, layer_of=STACKED, **options):
    options = {"sampler": "uniform", **options}
    return ist(inner, layer_of=layer_of, key=KEY, **SIZES, **options)


def grads_of(params):
    return jax.tree.map(lambda leaf: jnp.sin(7 * leaf) + 0.3 * leaf, params)


def run(tx, params, updates, **extra):
    """Returns the parameters and the state after every update."""
    state, history = tx.init(params), []
    step = jax.jit(lambda params, state: tx.update(
        grads_of(params), state, params, **extra
    ))  # fmt: skip
    for _ in range(updates):
        change, state = step(params, state)
        params = optax.apply_updates(params, change)
        history.append((params, state))
    return history


def rows(tree):
    """Returns the arrays of a tree of (L, ...) by layer."""
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(tree)]
    return [[leaf[i] for leaf in leaves] for i in range(LAYERS)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_frozen_layers_stay_to_the_last_bit(decay):
    params = stacked_params()
    before, state = params, None
    for after, now in run(make(optax.adamw(1e-2, weight_decay=decay)), params, 20):
        active = set(np.array(now.sampler.active).tolist())
        old, new = rows(before["layers"]), rows(after["layers"])
        for layer in range(LAYERS):
            assert same(old[layer], new[layer]) == (layer not in active)
            if state is not None:
                kept = same(rows(state.stacked)[layer], rows(now.stacked)[layer])
                assert kept == (layer not in active)
        assert float(before["head"]) != float(after["head"])
        before, state = after, now


def test_adam_counts_the_updates_of_its_layer():
    _, state = run(make(optax.adam(1e-2)), stacked_params(), 30)[-1]
    counts = np.array(optax.tree.get(state.stacked, "count"))
    assert counts.sum() == 60 and len(set(counts.tolist())) > 1
    assert int(optax.tree.get(state.outside, "count")) == 30


def test_an_active_layer_moves_as_if_it_were_alone():
    # Layer 4 is active in every update, so it sees plain AdamW.
    params, inner = stacked_params(), optax.adamw(1e-2)
    after, _ = run(make(inner, sampler=Static.of(1, 4, num_layers=6)), params, 9)[-1]
    alone = jax.tree.map(lambda leaf: leaf[4], params["layers"])
    alone, _ = run(inner, alone, 9)[-1]
    kept = jax.tree.map(lambda leaf: leaf[4], after["layers"])
    jax.tree.map(np.testing.assert_array_equal, kept, alone)


def test_all_layers_active_is_the_inner_transformation():
    params, inner = stacked_params(), optax.adamw(1e-2)
    tx = ist(inner, layer_of=STACKED, num_layers=6, num_active=6, key=KEY,
             sampler="uniform")  # fmt: skip
    expected, _ = run(inner, params, 10)[-1]
    after, _ = run(tx, params, 10)[-1]
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.quick(1)
def test_stacks_and_single_leaves_give_the_same(restart):
    inner = optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10))
    options = {"restart": restart, "hold": 2}
    one, state = run(make(inner, **options), stacked_params(), 12)[-1]
    other, other_state = run(make(inner, LISTED, **options), listed_params(), 12)[-1]
    np.testing.assert_array_equal(state.sampler.active, other_state.sampler.active)
    for x, y in zip(jax.tree.leaves(listed(one)), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_a_schedule_counts_the_updates_of_the_model():
    # The rate is 1 at the first update and 0 ever after: whatever was not active at
    # the first update never moves.
    schedule = lambda count: jnp.where(count == 0, 1.0, 0.0)
    for layer_of, params in ((STACKED, stacked_params()), (LISTED, listed_params())):
        history = run(make(optax.sgd(schedule), layer_of), params, 12)
        first = jax.tree.leaves(history[0][0])
        for x, y in zip(first, jax.tree.leaves(history[-1][0]), strict=True):
            np.testing.assert_array_equal(x, y)


def test_an_injected_schedule_counts_the_updates_of_the_model():
    schedule = lambda count: 1.0 / (1 + count)
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=schedule)
    _, state = run(make(inner), stacked_params(), 12)[-1]
    rates = np.array(state.stacked.hyperparams["learning_rate"])
    np.testing.assert_allclose(rates, np.full(LAYERS, 1 / 12), rtol=1e-6)


def test_a_restart_forgets_the_moments_of_a_layer():
    options = {"sampler": "cyclic", "restart": True}
    history = run(make(optax.adam(1e-2), **options), stacked_params(), 9)
    counts = [np.array(optax.tree.get(s.stacked, "count")) for _, s in history]
    # Each of three blocks has been active three times, anew every time.
    assert all(count.max() == 1 for count in counts)
    _, state = run(make(optax.adam(1e-2), sampler="cyclic"), stacked_params(), 9)[-1]
    assert np.array(optax.tree.get(state.stacked, "count")).tolist() == [3] * 6


def test_a_layer_that_stays_active_is_not_restarted():
    options = {"sampler": Static.of(0, 1, num_layers=6), "restart": True}
    _, state = run(make(optax.adam(1e-2), **options), stacked_params(), 5)[-1]
    assert np.array(optax.tree.get(state.stacked, "count")).tolist()[:2] == [5, 5]


@pytest.mark.parametrize(
    ("always_on", "moves"), [(None, True), ("head", True), ((), False)]
)
def test_what_lies_outside_the_layers(always_on, moves):
    params = stacked_params()
    after, _ = run(make(optax.adamw(1e-2), always_on=always_on), params, 3)[-1]
    assert (float(after["head"]) != float(params["head"])) == moves


def test_a_leaf_inside_the_layers_may_always_be_on():
    params = stacked_params()
    after, _ = run(make(optax.adamw(1e-2), always_on="layers/b"), params, 1)[-1]
    assert np.all(np.array(after["layers"]["b"]) != np.array(params["layers"]["b"]))
    assert float(after["head"]) == float(params["head"])


def test_probes_come_every_ten_updates_and_move_the_importance():
    value_fn = lambda strength: 1.0 - 0.9 * strength[0]
    tx = make(optax.sgd(0.1), sampler="ist")
    history = run(tx, stacked_params(), 31, value_fn=value_fn)
    memory = [state.sampler.memory for _, state in history]
    assert [int(m.probes) for m in memory] == [i // 10 for i in range(31)]
    assert int(memory[-1].importance.argmax()) == 0


def test_the_sets_are_those_of_the_sampler():
    sampler = Fixed(**SIZES, proportions=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    history = run(make(optax.sgd(0.1), sampler=sampler), stacked_params(), 10)
    state = begin(sampler, KEY)
    for _, now in history:
        state = advance(sampler, state)
        np.testing.assert_array_equal(now.sampler.active, state.active)


def test_gradient_norms_reach_the_sampler():
    for layer_of, params in ((STACKED, stacked_params()), (LISTED, listed_params())):
        tx = make(optax.sgd(0.0), layer_of, sampler=GradientNorm(**SIZES, decay=0.0))
        _, state = run(tx, params, 20)[-1]
        grads = grads_of(stacked_params()["layers"])
        squares = np.array(grads["a"]) ** 2, np.array(grads["b"]) ** 2
        norms = np.sqrt(squares[0].sum(axis=1) + squares[1])
        seen = np.array(state.sampler.memory.seen)
        assert seen.sum() >= 4
        found = np.array(state.sampler.memory.norms)
        np.testing.assert_allclose(found[seen], norms[seen], rtol=1e-5)


def test_clipping_in_front_and_masking_around_work():
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(optax.adamw(1e-2)))
    after, _ = run(tx, stacked_params(), 3)[-1]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))


def test_ist_without_a_value_function_says_so():
    tx, params = make(optax.sgd(0.1), sampler="ist"), stacked_params()
    with pytest.raises(ValueError, match="`value_fn` must be passed to `update`"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_of": "blocks"}, "`layer_of` must match at least one parameter"),
        ({"layer_of": r"layers/(\w)"}, "`layer_of` must find a number in `layers/a`"),
        ({"layer_of": "head"}, r"`head` must have num_layers=6 as its first axis"),
        ({"layer_of": lambda name: 0}, "`layer_of` must find a leaf for every layer, "
         "got none for layer 1, 2, 3, 4, 5"),
        ({"layer_of": lambda name: 9}, "`num_layers` must be more than 9, the layer"),
        ({"layer_of": STACKED, "always_on": "tail"}, "`always_on` must match"),
    ],
)  # fmt: skip
@pytest.mark.quick(1)
def test_leaves_and_layers_that_do_not_fit_are_named(options, message):
    tx = ist(optax.sgd(0.1), key=KEY, **SIZES, **options)
    with pytest.raises(InputError, match=message):
        tx.init(stacked_params())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_active": 7}, r"`num_active` must be in \[1, num_layers=6\], got 7"),
        ({"num_active": 0}, "got 0"),
        ({"sampler": "best"}, "`sampler` must be a `Sampler`, or one of ist, uniform"),
        ({"sampler": Static.of(1, num_layers=6)}, "`num_active` must be 1 as in"),
        ({"sampler": Static.of(1, 2, num_layers=6), "hold": 3}, "`hold` must be 1 as"),
        ({"probe_every": 0}, "`probe_every` must be at least 1"),
    ],
)
def test_arguments_that_break_a_rule_are_named(options, message):
    options = {"layer_of": STACKED, "key": KEY, **SIZES, **options}
    with pytest.raises(InputError, match=message):
        ist(optax.sgd(0.1), **options)
