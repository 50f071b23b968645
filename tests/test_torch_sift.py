"""The released SIFT, against a trace of the original class.

`golden_sift.npz` holds the weights of three bias-free layers after each of twelve
backward passes of the original code (PyTorch, float32): arrays `init/<name>`, batches
`x/<i>` and `y/<i>`, supports `idx/<name>` in descending |gradient|, weights
`w/<t>/<name>`, and `hyper` = [learning rate, b1, b2, eps].
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax

NAMES = ("a.weight", "b.weight", "c.weight")


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).with_name("golden_sift.npz")))


def loss(params, x, y):
    h = jnp.tanh(x @ params["a.weight"].T)
    h = jnp.tanh(h @ params["b.weight"].T)
    return jnp.mean((h @ params["c.weight"].T - y) ** 2)


def run(golden, weight_decay=0.0):
    rate, b1, b2, eps = golden["hyper"]
    inner = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    tx = sparse_jax.sift(inner, density=0.2, compat="torch-sift")
    params = {name: jnp.asarray(golden[f"init/{name}"]) for name in NAMES}
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trace = []
    for i in range(12):
        params, state = step(params, state, golden[f"x/{i}"], golden[f"y/{i}"])
        trace.append(params)
    return trace, state


def test_the_network_is_the_one_of_the_trace(golden):
    params = {name: jnp.asarray(golden[f"init/{name}"]) for name in NAMES}
    first = loss(params, golden["x/0"], golden["y/0"])
    np.testing.assert_allclose(first, 1.48104, atol=1e-5)


def test_the_supports_are_those_of_the_original(golden):
    _, state = run(golden)
    for name in NAMES:
        expected = np.sort(golden[f"idx/{name}"])
        np.testing.assert_array_equal(state.support[name], expected)


@pytest.mark.parametrize("t", range(12))
@pytest.mark.quick(3)
def test_the_weights_follow_the_original(golden, t):
    trace, _ = run(golden)
    for name in NAMES:
        np.testing.assert_allclose(
            trace[t][name], golden[f"w/{t}/{name}"], rtol=0, atol=1e-6
        )


def test_the_optimizer_counts_are_those_of_the_original(golden):
    _, state = run(golden)
    counts = (state.late_state[0].count, state.inner_state[0].count)
    assert tuple(map(int, counts)) == (11, 12)


def test_weight_decay_does_nothing_as_in_the_original(golden):
    plain, _ = run(golden)
    decayed, _ = run(golden, weight_decay=0.5)
    for name in NAMES:
        np.testing.assert_array_equal(plain[-1][name], decayed[-1][name])
