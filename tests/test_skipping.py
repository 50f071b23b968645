"""An update whose loss or gradient is not finite changes nothing and is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_sharding
from test_compact import loss as plain_loss
from test_compact import make_batch, make_params

from sparse_jax import (
    Compact,
    Dense,
    GradientNorm,
    Importance,
    Layerwise,
    LoRA,
    Sparse,
    Uniform,
)
from sparse_jax.sharding.mesh import MeshShape, make_mesh
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner

HEAD = "^classifier/"
SIFT = Sparse(density=0.1, where="^layers/.*(query|up)/", dense=HEAD)
LORA = LoRA(rank=2, where="attention/query", dense=HEAD)
TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(lambda count: 0.1 / (count + 1), weight_decay=0.1),
)
SIZES = {"num_layers": 3, "num_active": 1}
PROBING = Importance(**SIZES, num_suppressed=1, probe_every=1)


def loss(params, batch, key, attachment):
    total, weight = plain_loss(params, batch, key, attachment)
    return jnp.mean(batch["factor"]) * total, weight


TUNERS = {
    "sift": Compact(loss, SIFT, TX),
    "sift, two parts": Compact(loss, SIFT, TX, accumulate=2, split_masters=True),
    "full": Compact(loss, Dense(dense=".*"), TX),
    "sift, importance": Layerwise(loss, SIFT, TX, sampler=PROBING, split_masters=True),
    "full, norms, restarted": Layerwise(
        loss,
        Dense(dense="^layers/.*(query|bias)|^classifier/"),
        TX,
        sampler=GradientNorm(**SIZES),
        restart=True,
        max_norm=1.0,
    ),
    "lora, held": Layerwise(loss, LORA, TX, sampler=Uniform(**SIZES, hold=2)),
}


def batch_of(seed, tuner, *factors):
    """Returns a batch in the parts of a tuner; each part has a factor of its loss."""
    batch = make_batch(seed)
    if tuner.accumulate == 1:
        return batch | {"factor": jnp.full(8, factors[-1])}
    parts = tuner.accumulate
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    return split | {"factor": jnp.tile(jnp.array(factors)[:, None], 8 // parts)}


def bits(state):
    """Returns the bytes of every array of a state."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sift", jnp.float32),
        pytest.param("sift, two parts", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("full", jnp.bfloat16, marks=pytest.mark.slow),
        ("sift, importance", jnp.bfloat16),
        ("full, norms, restarted", jnp.bfloat16),
        ("lora, held", jnp.float32),
    ],
)
@pytest.mark.quick(1)
def test_a_gradient_that_is_not_finite_is_as_if_it_had_not_come(name, dtype):
    tuner = TUNERS[name]
    step = jax.jit(tuner.step)
    good = [batch_of(i, tuner, 1.0, 1.0) for i in range(3)]
    state = jax.jit(tuner.init)(make_params(dtype), jax.random.key(1))
    state, _ = jax.jit(tuner.select)(state, good[0], jax.random.key(0))
    for i in range(2):
        state, metrics = step(state, good[i], jax.random.key(i))
        assert not metrics["is_skipped"]
    # Losses of 1e30 have squared gradients that float32 does not hold.
    for factor in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        bad = batch_of(2, tuner, 1.0, factor)
        after, metrics = step(state, bad, jax.random.key(2))
        assert metrics["is_skipped"]
        assert bits(after) == bits(state)
    assert jnp.isfinite(metrics["loss"])
    assert int(state.count) == 2
    state, metrics = step(state, good[2], jax.random.key(2))
    assert (int(state.count), bool(metrics["is_skipped"])) == (3, False)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["sift", "sift, importance"])
@pytest.mark.slow
def test_nothing_moves_until_a_selection_has_been_made(name):
    tuner = TUNERS[name]
    select, step = jax.jit(tuner.select), jax.jit(tuner.step)
    state = tuner.init(make_params(), jax.random.key(1))
    good, bad = (batch_of(0, tuner, factor) for factor in (1.0, jnp.nan))
    kept, finite = select(state, bad, jax.random.key(0))
    assert not finite
    after, metrics = step(kept, good, jax.random.key(0))
    assert metrics["is_skipped"]
    assert bits(after) == bits(kept) == bits(state)
    state, finite = select(after, good, jax.random.key(0))
    assert finite
    state, metrics = step(state, good, jax.random.key(0))
    assert (int(state.count), bool(metrics["is_skipped"])) == (1, False)


def test_a_batch_without_targets_is_skipped():
    nothing = lambda params, batch, key, attachment: (0.0 * jnp.sum(params["w"]), 0.0)
    tuner = Compact(nothing, Dense(dense="w", stack=None), optax.adam(0.1))
    state = tuner.init({"w": jnp.arange(3.0)}, jax.random.key(0))
    after, metrics = jax.jit(tuner.step)(state, (), jax.random.key(0))
    assert metrics["is_skipped"]
    assert bits(after) == bits(state)


UNIFORM = Uniform(num_layers=4, num_active=1)


@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        ("sift", None),
        pytest.param("sift", UNIFORM, marks=pytest.mark.slow),
        pytest.param("full", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_one_example_that_is_not_finite_skips_the_update_of_all_devices(
    method, sampler
):
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    placement = Placement.of(test_sharding.tiny_decoder()[0].abstract(), mesh)
    tuner, params = test_sharding.tuner_of(
        test_sharding.METHODS[method], placement, sampler=sampler
    )
    runner = MeshRunner(tuner, placement)
    good = test_sharding.random_batch()
    bad = good | {"weights": good["weights"].copy()}
    bad["weights"][0, 3] = np.nan
    state = runner.init(jax.device_put(params, placement.params), jax.random.key(0))
    state, _ = runner.select(state, placement.put(good), jax.random.key(1))
    state, metrics = runner.step(state, placement.put(good), jax.random.key(0))
    assert not metrics["is_skipped"]
    before = bits(state)
    state, metrics = runner.step(state, placement.put(bad), jax.random.key(1))
    assert metrics["is_skipped"]
    assert bits(state) == before
