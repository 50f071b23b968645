"""Which layers are drawn, how often, and what a probe teaches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import (
    CKA,
    Cyclic,
    Fixed,
    GradientNorm,
    Importance,
    Middle,
    Spectral,
    Static,
    Uniform,
    ist,
)
from sparse_jax.errors import InputError
from sparse_jax.samplers.sampler import advance, begin, draw_layers

SAMPLERS = {
    "importance": Importance(num_layers=6, num_active=2),
    "uniform": Uniform(num_layers=6, num_active=2),
    "uniform, held": Uniform(num_layers=6, num_active=2, hold=3),
    "fixed": Fixed(num_layers=6, num_active=2, proportions=(1, 2, 3, 0, 0, 0)),
    "static": Static.of(5, 1, num_layers=6),
    "ascending": Cyclic(num_layers=6, num_active=2),
    "descending": Cyclic(num_layers=6, num_active=2, descending=True),
    "shuffled": Cyclic(num_layers=6, num_active=2, shuffled=True),
    "norms": GradientNorm(num_layers=6, num_active=2),
    "middle": Middle(num_layers=6, num_active=2),
    "normalized": Importance(num_layers=6, num_active=2, normalize_rewards=True),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def draws(sampler, num, value_fn=lambda strength: 1.0 - strength.mean(), seed=0):
    """Returns the active layers of some updates, shape=(num, num_active)."""

    def one(state, _):
        state = advance(sampler, state, value_fn)
        return state, state.active

    state = begin(sampler, jax.random.key(seed))
    return np.array(jax.lax.scan(one, state, length=num)[1])


@every_sampler
def test_active_layers_are_sorted_and_different(sampler):
    active = draws(sampler, 40)
    assert active.dtype == np.int32 and active.shape == (40, 2)
    assert np.all(np.diff(active, axis=1) > 0)
    assert active.min() >= 0 and active.max() <= 5


@every_sampler
def test_a_run_that_continues_draws_what_it_would_have_drawn(sampler):
    step = jax.jit(lambda state: advance(sampler, state, lambda s: 1.0 - s[0]))
    state = begin(sampler, jax.random.key(3))
    for _ in range(15):
        state = step(state)
    stored = jax.tree.map(np.asarray, state)
    for _ in range(15):
        state = step(state)
    for _ in range(15):
        stored = step(stored)
    jax.tree.map(np.testing.assert_array_equal, state, stored)


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("ascending", [[0, 1], [2, 3], [4, 5], [0, 1]]),
        ("descending", [[4, 5], [2, 3], [0, 1], [4, 5]]),
        ("static", [[1, 5], [1, 5], [1, 5], [1, 5]]),
        ("middle", [[2, 3], [2, 3], [2, 3], [2, 3]]),
    ],
)
def test_rules_without_chance_go_round(name, turns):
    np.testing.assert_array_equal(draws(SAMPLERS[name], 4), turns)


def test_a_shuffled_cycle_has_every_layer_once():
    active = draws(SAMPLERS["shuffled"], 30).reshape(10, 6)
    np.testing.assert_array_equal(np.sort(active, axis=1), [range(6)] * 10)
    assert len({tuple(cycle) for cycle in active.tolist()}) > 5


def test_a_choice_is_held():
    active = draws(SAMPLERS["uniform, held"], 12).reshape(4, 3, 2)
    np.testing.assert_array_equal(active, np.repeat(active[:, :1], 3, axis=1))
    assert len({tuple(row) for row in active[:, 0].tolist()}) > 1


def test_layers_are_drawn_in_proportion():
    num = 4000
    sampler = Fixed(num_layers=4, num_active=1, proportions=(1, 2, 3, 0))
    counts = np.bincount(draws(sampler, num)[:, 0], minlength=4)
    for count, p in zip(counts, (1 / 6, 2 / 6, 3 / 6, 0), strict=True):
        # Five standard errors of a binomial count.
        assert abs(count - num * p) <= 5 * math.sqrt(num * p * (1 - p))


def test_drawing_without_replacement_equals_sequential_draws():
    # First 0 then 1, or first 1 then 0, of weights 1, 2, 3: 1/6 2/5 + 2/6 1/4.
    keys = jax.random.split(jax.random.key(0), 5000)
    weights = jnp.log(jnp.array([1.0, 2.0, 3.0]))
    active = jax.vmap(lambda key: draw_layers(key, weights, 2))(keys)
    share = np.mean(np.all(np.array(active) == [0, 1], axis=1))
    assert abs(share - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 5000)


def numpy_ist(value_fn, key, updates, *, num_layers, num_active, num_suppressed):
    """The algorithm of `ist.py`, with the sign turned and its draws by Gumbel noise."""
    probe_key, draw_key = jax.random.split(key)
    noise = lambda key: np.array(jax.random.gumbel(key, (num_layers,)))
    log_sigmoid = lambda x: -np.logaddexp(0, -x)

    def sample(log_weights, key, num):
        return sorted(np.argsort(-(log_weights + noise(key)), kind="stable")[:num])

    importance, sets = np.zeros(num_layers, np.float64), []
    for t in range(updates):
        if t > 0 and t % 10 == 0:
            fold = jax.random.fold_in(probe_key, t)
            subsets = []
            while len(subsets) < 3:
                tries, row = 0, jax.random.fold_in(fold, len(subsets))
                draw = lambda tries, row=row: sample(
                    log_sigmoid(-importance),
                    jax.random.fold_in(row, tries),
                    num_suppressed,
                )
                while (subset := draw(tries)) in subsets:
                    tries += 1
                subsets.append(subset)
            rewards = []
            for subset in subsets:
                strength = np.ones(num_layers, np.float32)
                strength[subset] = 0.25
                rewards.append(np.exp(-float(value_fn(jnp.array(strength)))))
            rewards = np.array(rewards) - np.mean(rewards)
            p = 1 / (1 + np.exp(-importance))
            for reward, subset in zip(rewards, subsets, strict=True):
                for i in subset:
                    importance[i] -= 10 * reward * p[i] * (1 - p[i])
        fold = jax.random.fold_in(draw_key, t)
        sets.append(sample(log_sigmoid(importance), fold, num_active))
    return importance, np.array(sets)


@pytest.mark.parametrize("num_layers", [4, 12])
def test_two_hundred_updates_equal_the_algorithm_in_numpy(num_layers):
    sizes = {"num_layers": num_layers, "num_active": num_layers // 4}
    use = jnp.linspace(0.0, 0.3, num_layers)
    value_fn = lambda strength: 1.0 + jnp.sum(use * (1 - strength))
    sampler, key = Importance(**sizes), jax.random.key(7)
    importance, sets = numpy_ist(
        value_fn, key, 200, **sizes, num_suppressed=num_layers // 2
    )

    def one(state, _):
        state = advance(sampler, state, value_fn)
        return state, state.active

    state, active = jax.lax.scan(one, begin(sampler, key), length=200)
    np.testing.assert_array_equal(active, sets)
    np.testing.assert_allclose(state.memory.importance, importance, rtol=0, atol=1e-5)
    assert int(state.memory.probes) == 19
    assert np.ptp(importance) > 0.1


def test_a_probe_by_hand():
    sampler = Importance(num_layers=2, num_active=1, num_probes=2)
    # Half of two layers: the subsets are {0} and {1}.
    losses = {(0.25, 1.0): math.log(2), (1.0, 0.25): math.log(4)}

    def value_fn(strength):
        damped = strength[0] < 1
        return jnp.where(damped, losses[0.25, 1.0], losses[1.0, 0.25])

    memory = sampler.probe(sampler.start(), jax.random.key(0), value_fn)
    # exp(-l) is 1/2 and 1/4, the mean 3/8, p (1 - p) = 1/4: 10 * 1/8 * 1/4.
    np.testing.assert_allclose(memory.importance, [-0.3125, 0.3125], rtol=1e-6)
    assert np.array(memory.suppressed).sum(axis=1).tolist() == [1, 1]
    assert int(memory.probes) == 1


@pytest.mark.slow
def test_the_subsets_of_a_probe_are_different():
    sampler = Importance(num_layers=4, num_active=1, num_probes=6)
    for seed in range(20):
        memory = sampler.probe(
            sampler.start(), jax.random.key(seed), lambda s: jnp.float32(0)
        )
        assert len({tuple(row) for row in np.array(memory.suppressed).tolist()}) == 6


def test_weights_at_the_end_of_their_range_draw_no_subset_for_ever():
    sampler = Importance(num_layers=4, num_active=1)
    memory = sampler.start()._replace(importance=jnp.array([9e9, 9e9, -9e9, -9e9]))
    memory = sampler.probe(memory, jax.random.key(0), lambda s: jnp.float32(0))
    assert bool(jnp.isfinite(memory.importance).all())


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_probe_that_is_not_finite_is_skipped_and_counted(loss):
    sampler = Importance(num_layers=4, num_active=1)
    start = sampler.start()._replace(importance=jnp.arange(4.0))
    value_fn = lambda strength: jnp.where(strength[0] < 1, loss, 1.0)
    memory = sampler.probe(start, jax.random.key(0), value_fn)
    np.testing.assert_array_equal(memory.importance, start.importance)
    assert (int(memory.probes), int(memory.skipped)) == (0, 1)


@pytest.mark.parametrize("normalize", [False, True])
def test_equal_losses_teach_nothing(normalize):
    sampler = Importance(num_layers=6, num_active=2, normalize_rewards=normalize)
    memory = sampler.probe(sampler.start(), jax.random.key(0), lambda s: jnp.float32(2))
    np.testing.assert_array_equal(memory.importance, np.zeros(6))


@pytest.mark.parametrize("base", [0.0, 3.0, 200.0])
def test_normalized_rewards_move_the_importance_as_far_at_any_loss(base):
    options = {"importance_rate": 0.5, "normalize_rewards": True}
    sampler = Importance(num_layers=3, num_active=1, num_suppressed=1, **options)
    # exp(-loss) is in the ratio of 4, 2 and 1 to one another.
    value_fn = lambda s: base + math.log(2) * jnp.dot(1 - s, jnp.arange(3.0)) / 0.75
    moved = sampler.probe(sampler.start(), jax.random.key(0), value_fn).importance
    rewards = (np.array([4, 2, 1]) - 7 / 3) / np.std([4, 2, 1])
    # At 200 nats float32 has 5 digits after the point.
    np.testing.assert_allclose(moved, -0.5 * rewards / 4, rtol=1e-4)


def gram_cka(x, y):
    """CKA by the products of the tokens, not of the features."""
    center = np.eye(len(x)) - 1 / len(x)
    k, m = center @ x @ x.T @ center, center @ y @ y.T @ center
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def test_cka_equals_the_reference_of_numpy_and_sees_no_padding():
    random = np.random.default_rng(0)
    states = random.normal(size=(4, 2, 9, 5)) + 3.0
    turn = np.linalg.qr(random.normal(size=(5, 5)))[0]
    states[1] = 1e4 * states[0] @ turn + 7.0  # such a layer changes nothing
    is_token = np.arange(9)[None] < np.array([[9], [6]])
    tokens = [state[is_token] for state in states]
    found = CKA(num_layers=3, num_active=1).measure(
        {}, lambda: (jnp.array(states, jnp.float32), jnp.array(is_token))
    )
    expected = [1 - gram_cka(x, y) for x, y in zip(tokens, tokens[1:], strict=False)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert abs(expected[0]) < 1e-9 and expected[1] > 0.3


def test_signal_to_noise_equals_the_reference_of_numpy():
    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 60, 90))
    spikes = np.linalg.qr(random.normal(size=(60, 2)))[0] * [60.0, 40.0]
    kernel[1] += spikes @ np.linalg.qr(random.normal(size=(90, 2)))[0].T
    kernel[2] *= 100.0  # of noise no scale makes a signal
    layers = {
        "up": {"kernel": jnp.array(kernel, jnp.float32), "bias": jnp.ones((3, 9))}
    }
    scores = Spectral(num_layers=3, num_active=1).measure(layers)
    s = np.linalg.svd(kernel[1], compute_uv=False)
    # Deviation 1: the two spikes alone are above sqrt(60) + sqrt(90).
    assert (s > math.sqrt(60) + math.sqrt(90)).sum() == 2
    np.testing.assert_allclose(scores[1], s[:2].sum() / s[2:].sum(), rtol=1e-5)
    assert max(scores[0], scores[2]) < 0.05 < scores[1]


def test_a_sampler_that_measures_is_refused_where_nobody_measures():
    with pytest.raises(InputError, match="`sampler` must be one that measures no mod"):
        ist(optax.sgd(1.0), layer_of="^l/", num_layers=2, num_active=1, sampler="cka",
            key=jax.random.key(0))  # fmt: skip


def planted_ratio(use, probes, seeds):
    """Mean train weight of the 8 important of 32 layers over that of the others."""
    sampler = Importance(num_layers=32, num_active=8)
    uses = jnp.where(jnp.arange(32) < 8, use, use / 10)

    def one(memory, key):
        noise_key, probe_key = jax.random.split(key)
        base = 1.0 + 0.05 * jax.random.normal(noise_key)
        value_fn = lambda strength: base + jnp.sum(uses * (1 - strength))
        return sampler.probe(memory, probe_key, value_fn), None

    def run(seed):
        keys = jax.random.split(jax.random.key(seed), probes)
        weights = sampler.weights(jax.lax.scan(one, sampler.start(), keys)[0])
        return weights[:8].mean() / weights[8:].mean()

    return np.array(jax.vmap(run)(jnp.arange(seeds)))


@pytest.mark.parametrize(
    ("use", "probes", "reference"),
    # One run of a NumPy program each; ratios of many runs spread around it.
    [(0.005, 100, 1.08), (0.02, 100, 1.31), (0.02, 300, 1.94), (0.05, 300, 2.82),
     (0.05, 1000, 5.34)],
)  # fmt: skip
@pytest.mark.quick(1)
def test_planted_importance_is_found_as_fast_as_in_the_reference(
    use, probes, reference
):
    ratios = planted_ratio(use, probes, seeds=16)
    assert ratios.min() < reference < ratios.max() or (
        abs(ratios.mean() - reference) < 3 * ratios.std(ddof=1)
    )
    assert ratios.mean() > 1


def test_large_gradients_are_drawn_more_often():
    sampler = GradientNorm(num_layers=3, num_active=1, decay=0.5)
    memory = sampler.observe(sampler.start(), jnp.array([0, 2]), jnp.array([1.0, 3.0]))
    # Layer 1 was never seen and has the mean, 2.
    weights = np.array(sampler.weights(memory))
    np.testing.assert_allclose(weights, np.exp([-1.0, -0.5, 0.0]), rtol=1e-6)
    memory = sampler.observe(memory, jnp.array([2]), jnp.array([5.0]))
    np.testing.assert_array_equal(memory.norms, [1.0, 0.0, 4.0])
    memory = sampler.observe(memory, jnp.array([2]), jnp.array([math.nan]))
    np.testing.assert_array_equal(memory.norms, [1.0, 0.0, 4.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(num_layers=4, num_active=0),
         r"`num_active` must be in \[1, num_layers=4\], got 0\."),
        (lambda: Uniform(num_layers=4, num_active=5), r"num_layers=4\], got 5"),
        (lambda: Uniform(num_layers=4, num_active=1, hold=0), "`hold` must be at"),
        (lambda: Importance(num_layers=4, num_active=1, num_suppressed=5),
         "`num_suppressed` must be in"),
        (lambda: Importance(num_layers=1, num_active=1), "`num_suppressed` must be in"),
        (lambda: Importance(num_layers=2, num_active=1),
         "`num_probes` must be at most 2, the different subsets of 1 of 2 layers"),
        (lambda: Importance(num_layers=4, num_active=1, suppression=1.0),
         "`suppression` must be in"),
        (lambda: Importance(num_layers=4, num_active=1, importance_rate=math.nan),
         "`importance_rate` must be positive"),
        (lambda: Importance(num_layers=4, num_active=1, probe_every=0),
         "`probe_every` must be at least 1"),
        (lambda: Fixed(num_layers=3, num_active=1, proportions=(1, 2)),
         "`proportions` must have 3 numbers, one for each .* got 2"),
        (lambda: Fixed(num_layers=2, num_active=1, proportions=(1, -2)),
         "`proportions` must not be negative"),
        (lambda: Fixed(num_layers=2, num_active=2, proportions=(1, 0)),
         "`proportions` must have 2 positive numbers, .* got 1"),
        (lambda: Static.of(1, 1, num_layers=3), "`layers` must be 2 different"),
        (lambda: Static.of(3, num_layers=3), r"different numbers in \[0, 3\), got"),
        (lambda: GradientNorm(num_layers=3, num_active=1, temperature=0.0),
         "`temperature` must be positive"),
        (lambda: GradientNorm(num_layers=3, num_active=1, decay=1.0), "`decay` must"),
        (lambda: Cyclic(num_layers=3, num_active=1, descending=True, shuffled=True),
         "`descending` and `shuffled`"),
    ],
)  # fmt: skip
def test_numbers_that_break_a_rule_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
