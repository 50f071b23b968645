"""The bounds of docs/convergence.md hold on a smooth problem with known constants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import Fixed, Uniform, sift
from sparse_jax.samplers.sampler import advance, begin, is_active

# F(w) = sum of h (1 - cos w) over 4 layers of 3 entries: not convex, its least value
# is 0, and its gradient h sin w changes by at most max(h) = 4 times what w does.
H = jnp.array([[4.0, 1.0, 0.5], [2.0, 2.0, 0.1], [1.0, 3.0, 0.2], [0.5, 0.3, 4.0]])
SMOOTHNESS = 4.0
START = jnp.linspace(0.5, 2.5, 12).reshape(4, 3)
NOISE = jnp.array([0.1, 0.2, 0.3, 0.4])[:, None]  # deviation in each layer
VARIANCES = 3 * np.square(np.array(NOISE[:, 0]))  # of a layer
STEPS, RUNS = 200, 64
KEYS = jax.random.split(jax.random.key(0), RUNS)


def value(w):
    return float(jnp.sum(H * (1 - jnp.cos(w))))


def noisy(w, key):
    return H * jnp.sin(w) + NOISE * jax.random.normal(key, w.shape)


def squares(run, mask=1.0):
    """Returns the mean of |gradient|^2 over the updates of many runs."""
    path = jax.jit(jax.vmap(run))(KEYS)
    gradients = np.array(mask * H) * np.sin(np.array(path))
    return float(np.square(gradients).sum(axis=(2, 3)).mean())


@pytest.mark.parametrize("rate", [0.01, 0.25])
def test_a_fixed_support_comes_to_rest_in_its_subspace(rate):
    tx = sift(optax.sgd(rate), density=0.25)
    # The support is that of the true gradient, so that no noise chose it.
    start = {"w": START}
    updates, selected = tx.update({"w": H * jnp.sin(START)}, tx.init(start), start)
    mask = updates["w"] != 0
    assert int(mask.sum()) == 3

    def run(key):
        def step(carry, key):
            w, state = carry
            updates, state = tx.update({"w": noisy(w, key)}, state, {"w": w})
            return (w + updates["w"], state), w

        return jax.lax.scan(step, (START, selected), jax.random.split(key, STEPS))[1]

    variance = float(jnp.sum(jnp.where(mask, NOISE**2, 0)))
    fall = value(jnp.where(mask, START, 0.0))  # all of it can be gained
    bound = 2 * fall / (rate * STEPS) + rate * SMOOTHNESS * variance
    found = squares(run, mask)
    assert bound / 10 < found < bound
    # Outside nothing has moved.
    assert squares(run, ~mask) == pytest.approx(
        float(jnp.sum(jnp.square(jnp.where(mask, 0, H * jnp.sin(START))))), rel=1e-4
    )


SAMPLERS = {
    "uniform": (Uniform(num_layers=4, num_active=2), [0.5] * 4),
    "fixed": (
        Fixed(num_layers=4, num_active=1, proportions=(4.0, 3.0, 2.0, 1.0)),
        [0.4, 0.3, 0.2, 0.1],
    ),
}


def drawn_run(sampler, rate, divide):
    """Returns runs of masked descent; `divide` has a number for every layer."""

    def run(key):
        def step(carry, key):
            w, state = carry
            state = advance(sampler, state)
            scale = is_active(sampler, state.active) / jnp.array(divide)
            return (w - rate * scale[:, None] * noisy(w, key), state), w

        draws, noise = jax.random.split(key)
        carry = (START, begin(sampler, draws))
        return jax.lax.scan(step, carry, jax.random.split(noise, STEPS))[1]

    return run


@pytest.mark.parametrize("rate", [0.02, 0.25])
@pytest.mark.parametrize(("sampler", "p"), SAMPLERS.values(), ids=SAMPLERS)
def test_layers_drawn_at_random_all_come_to_rest(sampler, p, rate):
    variance = float(np.dot(p, VARIANCES))
    bound = 2 * value(START) / (min(p) * rate * STEPS)
    bound += rate * SMOOTHNESS * variance / min(p)
    assert bound / 30 < squares(drawn_run(sampler, rate, [1.0] * 4)) < bound


@pytest.mark.parametrize(("sampler", "p"), SAMPLERS.values(), ids=SAMPLERS)
def test_updates_divided_by_their_probability_come_to_rest(sampler, p):
    rate = min(p) / SMOOTHNESS
    variance = float(np.sum(VARIANCES / p))
    bound = 2 * value(START) / (rate * STEPS) + rate * SMOOTHNESS * variance
    assert bound / 30 < squares(drawn_run(sampler, rate, p)) < bound


def test_the_second_moment_is_least_in_proportion_to_the_norms():
    norms = np.array([4.0, 3.0, 2.0, 1.0])
    best = Fixed(num_layers=4, num_active=1, proportions=tuple(norms))
    draw = lambda key: advance(best, begin(best, key)).active[0]
    drawn = np.array(jax.vmap(draw)(jax.random.split(jax.random.key(1), 4000)))
    p = norms / norms.sum()
    # |g_l| / p_l is the same for every layer, so there is no variance at all.
    np.testing.assert_allclose(norms[drawn] / p[drawn], 10.0)
    moment = lambda p: np.sum(norms**2 / p)
    assert moment(p) == pytest.approx(norms.sum() ** 2)
    random = np.random.default_rng(0)
    assert all(moment(q) > moment(p) for q in random.dirichlet(np.ones(4), 50))
    # Unbiased: the mean of the updates of a layer is its gradient.
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share / p, 1, atol=0.15)
